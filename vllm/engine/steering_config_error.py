# SPDX-License-Identifier: Apache-2.0
"""Why an engine cannot start with its steering configuration."""


class SteeringConfigError(ValueError):
    """The engine cannot start with this steering configuration."""
