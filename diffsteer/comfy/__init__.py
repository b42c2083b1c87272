"""ComfyUI: the core as nodes, a node pack to install, and runs as graphs.

ComfyUI is imported inside functions only, and only in its own process: what describes nodes and graphs works without it.
"""
