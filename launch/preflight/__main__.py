"""`python -m launch.preflight RECIPE --run RUN --report FILE` on every rank."""

from launch.preflight.check import main

if __name__ == "__main__":
    main()
