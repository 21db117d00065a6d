"""What was meant by a command, an option or a word that is not there: what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from yelp_hpc.data.formats.endings import ENDINGS
from yelp_hpc.errors import in_shell, nearest
from yelp_hpc.rundir.paths import STAGES
from yelp_hpc.synonyms import CLUSTER, COMMANDS, NO_KEY, OPTIONS, SBATCH, SHORT, key_of


def command_meant(word: str, commands: Iterable[str]) -> str | None:
    """The message for a word that is no command at the top, None when nothing like it is known."""
    known = list(commands)
    name = word.lower().replace("_", "-")
    meant = name if name in STAGES else COMMANDS.get(name)
    meant = meant or nearest(name, [*known, *STAGES], cutoff=0.65)
    if meant is None:
        return None
    if meant not in STAGES or meant in known:
        return f"No such command {word!r}; did you mean `python -m yelp_hpc {meant}`?"
    return (
        f"No such command {word!r}; {meant} is a stage: "
        f"`python -m yelp_hpc submit {meant} --config FILE --run DIR`, or in this process "
        f"`python -m yelp_hpc run {meant} --run DIR`"
    )


def usage_meant(error: click.UsageError, arguments: Sequence[str]) -> str | None:
    """A better message than click's for a line that it refused, None when there is none.

    Args:
        arguments: the whole line, without the program's name.
    """
    if isinstance(error, click.BadOptionUsage) and "requires an argument" in error.message:
        value = "a.b=c" if error.option_name == "--set" else "a value"
        return f"{error.option_name} needs {value} behind it"
    if error.ctx is None:
        return None
    if isinstance(error, click.NoSuchOption):
        return option_meant(error.option_name, error.ctx.command, arguments)
    if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Argument):
        words = getattr(error.param.type, "choices", None)
        name = error.ctx.command.name
        if words:
            return f"{name} needs one of {', '.join(words)}"
        return f"{name} needs {error.param.metavar}: `{' '.join(_usage(error.ctx.command))}`"
    if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
        option = f"{error.param.opts[0]} {error.param.metavar or ''}".strip()
        word = next(iter(_left_over(error.ctx.command, arguments)), None)
        if word is None:
            return f"{option} is missing: {error.param.help}"
        needs = _option_of(word, error.ctx.command)
        needs = error.param.opts[0] if needs in (None, "--run") else needs
        return f"{option} is missing; write `{needs} {word}`"
    if error.message.startswith("Got unexpected extra argument"):
        return _extra_meant(error.ctx.command, arguments)
    if isinstance(error, click.BadParameter):
        if is_file := re.search(r"Directory '(.+)' is a file", error.message):
            folder = Path(is_file[1]).parent
            hint = (
                f"; write `--run {in_shell(folder)}`" if Path(is_file[1]).name == "run.json" else ""
            )
            option = error.param.opts[0] if error.param else "--run"
            return f"{option} takes a folder, and {is_file[1]} is a file{hint}"
        if error.ctx.command.name == "run" and error.message.startswith("'all' is not known"):
            return "run does one stage, here; all of them: `submit all --executor local`"
    return None


def _options(command: click.Command) -> list[str]:
    return [name for option in command.params for name in option.opts if name.startswith("--")]


def _left_over(command: click.Command, arguments: Sequence[str]) -> list[str]:
    """The words of a line that are neither the command, nor an option or its value."""
    with click.Context(command, info_name=command.name) as context:
        own = list(arguments)
        own = own[own.index(str(command.name)) + 1 :] if command.name in own else own
        try:
            return list(command.make_parser(context).parse_args(own)[1])
        except click.UsageError:
            return []


def _extra_meant(command: click.Command, arguments: Sequence[str]) -> str | None:
    """What a word too many was meant to be."""
    words = _left_over(command, arguments)
    if not words:
        return None
    before = [a for o, a, w in zip(arguments, arguments[1:], arguments[2:], strict=False)
              if (o, w) == ("--set", words[0])]  # fmt: skip
    if before:
        key = before[0].strip(":=")
        if "=" in key:
            return f"put it in quotes: --set '{key} {' '.join(words)}'"
        return f"write `--set {key}={words[0]}`, with = and without a space"
    if words[0] in (*STAGES, "all") and "--dry-run" in _options(command):
        return f"one stage at a time, or all of them: `{command.name} all`; {words[0]} is one more"
    option = _option_of(words[0], command)
    if option is None or option in arguments:
        return _takes_no(words[0], command)
    what = "a run directory" if option == "--run" else "a file"
    return f"{what} needs its option: `{option} {words[0]}`"


def _option_of(word: str, command: click.Command) -> str | None:
    """The option that a file or a folder was meant for, by its name's end."""
    wanted = ["--run"]
    if word.endswith((".yaml", ".yml")):
        wanted = ["--config", "--cluster", "--run"]
    elif word.lower().endswith(ENDINGS):
        wanted = ["--input", "--data", "--from"]
    options = _options(command)
    return next((option for option in wanted if option in options), None)


def option_meant(option: str, command: click.Command, arguments: Sequence[str] = ()) -> str:
    """What was meant by an option that `command` does not take, or what it takes.

    Args:
        arguments: what stands on the line beside it.
    """
    from yelp_hpc.config import Config
    from yelp_hpc.explain import dotted_keys

    name = option.lstrip("-").lower().replace("-", "_")
    own = _options(command)
    for known in own:
        if name == known.strip("-").replace("-", "_"):
            return f"there is no option {option}; did you mean {known}?"
    for meant, typed in OPTIONS.items():
        known = meant.split()[0]
        taken = next((p for p in command.params if known in p.opts), None)
        if taken is not None and name in typed.split() and known not in arguments:
            metavar = taken.metavar if taken.metavar in ("DIR", "FILE") else None
            spelt = f"{known} {metavar}" if metavar else meant
            return f"there is no option {option}; did you mean {spelt}?"
    if isinstance(command, click.Group):
        group = f"{command.name} " if command.name in _GROUPS else ""
        return (
            f"an option stands behind its command: `python -m yelp_hpc {group}COMMAND {option} …`"
        )
    if name in ("config", "set") and command.name in ("demo", "init"):
        return f"{command.name} takes no {option}: it brings or writes one"
    if name in ("config", "set") and "--run" in own:
        stage = command.name if command.name in STAGES else "all"
        return (
            f"{command.name} takes no {option}: the run directory holds its configuration; another "
            f"one: `python -m yelp_hpc submit {stage} --config FILE --run DIR --set a.b=c`"
        )
    keys = list(dotted_keys(Config))
    same = [key for key in keys if name in (key, key.rpartition(".")[2])]
    near = [known for known in own if nearest(name, [known.strip("-")], cutoff=0.75)]
    resource = CLUSTER.get(name, name if name in set(CLUSTER.values()) else "")
    key = next(iter(same), None) or (None if resource in _SITE else key_of(name))
    if key and "--set" in own:
        return f"there is no option {option}; it is a key of the config: --set {key}=VALUE"
    if near:
        return f"there is no option {option}; did you mean {near[0]}?"
    if key:
        return (
            f"there is no option {option}; it is a key of the config, {key}: "
            "change it there, and submit again"
        )
    name = SHORT.get(option.lstrip("-"), name).replace("-", "_")
    resource = CLUSTER.get(name, name if name in set(CLUSTER.values()) else "")
    if resource or name.replace("_", "-") in SBATCH:
        line = f"{resource}: VALUE" if resource else f"sbatch: {{{name.replace('_', '-')}: VALUE}}"
        return (
            f"there is no option {option}; it is a key of the cluster file, which --cluster names: "
            f"`{line}` under `defaults:`"
        )
    if name in NO_KEY:
        return f"there is no option {option}: {NO_KEY[name]}"
    key = "; a key of the config is changed by --set section.key=VALUE" if "--set" in own else ""
    return f"{_takes_no(option, command)}{key}"


def _takes_no(word: str, command: click.Command) -> str:
    with click.Context(command) as context:
        words = command.collect_usage_pieces(context)[1:]
    return f"{command.name} takes no {word}; it takes {', '.join([*words, *_options(command)])}"


def _usage(command: click.Command) -> list[str]:
    """The shortest line that has all that the command needs."""
    line = ["python -m yelp_hpc", str(command.name)]
    for one in command.params:
        if one.required:
            metavar = [str(one.metavar)] if one.metavar else []
            line += metavar if isinstance(one, click.Argument) else [one.opts[0], *metavar]
    return line


_GROUPS = ("config", "image")
_SITE = frozenset({"gpus", "gpu_type", "nodes", "cpus", "memory", "time", "partition", "account"})


class Words(click.Choice[str]):
    """One of some words in any letter case; another one's message names the word that is meant."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(words, case_sensitive=False)

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word; fails with the nearest."""
        from yelp_hpc.synonyms import word_meant

        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            several = [w for w in re.split(r"[,+; ]+", str(value)) if w in self.choices]
            words = ", ".join(self.choices)
            if len(several) > 1:
                self.fail(f"{value!r}: one at a time, of {words}", param, ctx)
            meant = word_meant(value, self.choices)
            hint = f"did you mean {meant}? It is " if meant else ""
            self.fail(f"{value!r} is not known; {hint}one of {words}", param, ctx)


def shards_of(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """The numbers that `3` or `0-2,5` names, ascending; None of None."""
    from yelp_hpc.rundir.attempts import task_of

    try:
        return None if value is None else task_of(value) or task_of(" ")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class Commands(click.Group):
    """Lists the commands in the order of a user's day, each with its whole summary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used, not by name."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a word that is no command gets the one that is meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            # a group's own commands are named by click, which knows nothing of stages
            meant = command_meant(args[0], self.commands) if ctx.parent is None else None
            if meant is None:
                raise
            raise click.UsageError(meant, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, but wrapped at words where click cuts off."""
        rows = [(name, self.commands[name].get_short_help_str(200)) for name in self.commands]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
