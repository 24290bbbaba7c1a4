"""What a model is: the Transformer in PyTorch, its ONNX graph, the artefact on disk, and the starters."""
