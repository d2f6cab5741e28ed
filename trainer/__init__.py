"""Clips -> step -> checkpoint, telemetry: the one training loop, its engine and the recipes. Knows nothing of Ray."""
