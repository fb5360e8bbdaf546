"""`python -m cladapt_cli`, and `torchrun -m cladapt_cli` for several processes."""

from cladapt_cli.app import main

if __name__ == "__main__":
    main()
