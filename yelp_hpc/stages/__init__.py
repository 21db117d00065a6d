"""What runs inside the image: one module a stage, each a function of files to files."""
