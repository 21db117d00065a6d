"""The image that every job runs in: built, described and checked."""
