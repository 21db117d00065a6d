"""ChatGLM3 in native code: the published model without its repository's own code."""
