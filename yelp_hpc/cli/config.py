"""`config show`: what is in force, and where each value came from."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import click

from yelp_hpc.cli.meant import Commands
from yelp_hpc.cli.options import CONFIG, JSON, SET
from yelp_hpc.progress import plain


@click.group(cls=Commands)
def config() -> None:
    """Look at configurations.

    \b
      python -m yelp_hpc config show --config configs/demo.yaml
    """


@config.command("show")
@CONFIG
@SET
@JSON
def config_show(config_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print what is in force and where each value came from.

    \b
      python -m yelp_hpc config show --config configs/demo.yaml --set lora.rank=16
    """
    from yelp_hpc.config import Config, load_config
    from yelp_hpc.explain import dotted_keys

    loaded = load_config(config_file, overrides)
    values = loaded.config.model_dump(mode="json")
    if as_json:
        click.echo(json.dumps({"config": values, "origin": loaded.origin}))
        return

    def value_of(key: str) -> Any:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        return json.dumps(value, ensure_ascii=False)

    rows = [(key, value_of(key), loaded.origin.get(key, "default")) for key in dotted_keys(Config)]
    widths = [min(48, max(len(row[i]) for row in rows)) for i in (0, 1)]
    if sys.stdout.isatty():  # a long value, the prompt's, is cut to the terminal; --json has all
        rows = [(key, value, origin.rpartition("/")[2]) for key, value, origin in rows]
        last = max(len(origin) for _, _, origin in rows)
        room = shutil.get_terminal_size().columns - widths[0] - last - 4
        widths[1] = max(12, min(widths[1], room))
        rows = [(k, v if len(v) <= widths[1] else f"{v[: widths[1] - 1]}…", o) for k, v, o in rows]
    for key, value, origin in rows:
        click.echo(plain(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}"))
