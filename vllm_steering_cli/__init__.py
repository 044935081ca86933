# SPDX-License-Identifier: Apache-2.0
"""The `vllm-steering` command's parser, outside `vllm` so that it starts at once.

Importing anything below `vllm` runs `vllm/__init__.py`, which imports torch. A
subcommand imports what it needs when it runs.
"""
