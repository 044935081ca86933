# SPDX-License-Identifier: Apache-2.0
"""The HTTP status for each outcome of a registry call."""

from vllm.config.steering_replies import Outcome

HTTP_STATUS: dict[Outcome, int] = {
    Outcome.DONE: 200,
    Outcome.DRAINING: 202,
    Outcome.LOADING: 202,
    Outcome.INVALID: 400,
    Outcome.UNKNOWN: 404,
    Outcome.CONFLICT: 409,
    Outcome.FAILED: 500,
    Outcome.STOPPING: 503,
}
