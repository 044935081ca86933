import os
__path__ = [os.path.dirname(__file__), os.environ.get("REPO", ".") + "/vllm"]
