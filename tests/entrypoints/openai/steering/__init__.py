# SPDX-License-Identifier: Apache-2.0
"""Tests of the OpenAI routes; a package, so that their server ends with the last."""
