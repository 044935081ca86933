# SPDX-License-Identifier: Apache-2.0
"""What the tests share: tiny models, the dense mathematics, the Hugging Face oracle."""
