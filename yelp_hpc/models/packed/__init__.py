"""Packed micro-batches for any decoder: attention, fused layers, LoRA and dropout."""
