"""`inferwatch topics`: check the topics against what they must be."""

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)
