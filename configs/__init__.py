"""Hydra configuration: one folder per group, one YAML per choice, each naming its class with ``_target_``."""
