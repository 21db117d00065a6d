"""The command `completion`, and what the shell is offered for options of this project's own."""

from __future__ import annotations

from typing import Any

import click
import click.shell_completion

PROGRAM = "yelp-hpc"
COMPLETE_VARIABLE = "_YELP_HPC_COMPLETE"
"""Asks the program for completions instead of a run; click derives it from the program's name."""


def complete_settings(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    """Keys of the configuration for `--set`."""
    from yelp_hpc.config import Config
    from yelp_hpc.explain import dotted_keys

    return _items(f"{key}=" for key in dotted_keys(Config) if key.startswith(incomplete))


def complete_cards(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    """Names of GPUs for `--gpu`, as Slurm writes them."""
    from yelp_hpc.gpus import CARDS

    names = (card.name.lower().replace("rtx ", "rtx").replace(" ", "_") for card in CARDS)
    return _items(name for name in names if name.startswith(incomplete.lower()))


def _items(values: Any) -> list[click.shell_completion.CompletionItem]:
    return [click.shell_completion.CompletionItem(value) for value in values]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes the command yelp-hpc in a shell.

    \b
    Once for each shell that you use:
      python -m yelp_hpc completion bash >> ~/.bashrc
      python -m yelp_hpc completion zsh >> ~/.zshrc      (after compinit)
      python -m yelp_hpc completion fish > ~/.config/fish/completions/yelp-hpc.fish
    yelp-hpc is the same program as python -m yelp_hpc.
    """
    kind = click.shell_completion.get_completion_class(shell)
    assert kind is not None  # one of the three
    maker = kind(ctx.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE)
    # not source(): it starts the shell to look at its version, and need not have it here
    click.echo(maker.source_template % maker.source_vars())
