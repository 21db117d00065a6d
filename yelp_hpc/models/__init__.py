"""The models: ChatGLM3 in native code, the loading of any other causal LM, packed attention."""
