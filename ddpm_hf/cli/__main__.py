"""`python -m ddpm_hf.cli`, for launchers that start modules."""

from .commands import main

if __name__ == "__main__":
    main()
