"""``python -m latentphys``, which `accelerate launch -m latentphys` runs as well."""

from latentphys.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
