"""rules, and the options that make a rule of inject, clear, powerfail and remove."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from daxemu.cli.common import PATH, Whole, connect, emit, json_option, table
from daxemu.cli.patience import PatientClient
from daxemu.errors import InvalidArgument
from daxemu.protocol import AddRule
from daxemu.rule import ALONE, Action, On, parse_on

F = TypeVar("F", bound=Callable[..., Any])


class RuleOptions(NamedTuple):
    """Options that make a rule of a verb."""

    on: On
    name: str | None
    seed: int
    then: list[Action]
    """Actions after the verb's own."""


def rule_options(command: F) -> F:
    """Add ``--on`` and its companions to a verb. The verb gets ``rule``: RuleOptions, or None without
    ``--on``.
    """

    def collected(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(f"rule_{name}") for name in ("on", "by", "after", "name", "seed", "then")}
        return command(*args, **kwargs, rule=_options(**given))

    collected.__doc__, collected.__name__ = command.__doc__, command.__name__
    collected.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    options = (
        click.option(
            "--on",
            "rule_on",
            metavar="OP:FILE[:WHEN]",
            help="Not now: when an operation matches. WHEN: 3, 3+, 3+2, 1..5 or 5%; default: 1.",
        ),
        click.option(
            "--by", "rule_by", metavar="COMM|PID", help="With --on: only operations of this process."
        ),
        click.option(
            "--after", "rule_after", is_flag=True, help="With --on: after the operation, not before."
        ),
        click.option(
            "--then",
            "rule_then",
            multiple=True,
            type=click.Choice(sorted(ALONE)),
            help="With --on: do this, too; repeatable.",
        ),
        click.option("--rule", "rule_name", metavar="NAME", help="With --on: name of the rule."),
        click.option("--rule-seed", "rule_seed", type=Whole(), default=0, help="With --on: seed of a %."),
    )
    for option in reversed(options):
        option(collected)
    return collected  # type: ignore[return-value]


def _options(
    on: str | None, by: str | None, after: bool, name: str | None, seed: int, then: tuple[str, ...]
) -> RuleOptions | None:
    if on is None:
        if by or after or name or seed or then:
            raise InvalidArgument(
                "--by, --after, --then, --rule and --rule-seed belong to --on: give --on, too"
            )
        return None
    return RuleOptions(parse_on(on, by, after=after), name, seed, [ALONE[word] for word in then])


def add_rule(client: PatientClient, rule: RuleOptions, action: Action, *, as_json: bool) -> None:
    """Add a rule with ``action``, and print the name of the rule. Raises InvalidArgument."""
    added = client.ask(AddRule(rule.on, [action, *rule.then], rule.name, rule.seed))
    emit({"name": added.name}, as_json, f"rule {added.name}: {rule.on}: {action}")


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--delete", "deleted", metavar="NAME", multiple=True, help="Delete a rule; repeatable.")
@click.option("--delete-all", is_flag=True, help="Delete all rules.")
@json_option
@rule_options
def rules(
    mountpoint: Path,
    deleted: tuple[str, ...],
    delete_all: bool,
    as_json: bool,
    rule: RuleOptions | None,
) -> None:
    """List the rules of a mount, delete rules, or add a rule: what happens when an operation of a program
    matches. inject, clear, powerfail and remove have --on, too. Rules end with the mount.

    \b
    Example:
      daxemu rules /tmp/pmem
      daxemu rules /tmp/pmem --on 'rename:CURRENT:2+' --then kill
    """
    if (rule is not None) + bool(deleted) + delete_all > 1:
        raise InvalidArgument("--on, --delete and --delete-all: give one of them")
    if rule is not None and not rule.then:
        raise InvalidArgument("--on without --then does nothing: give --then, or see daxemu inject --on")
    with connect(mountpoint) as client:
        if rule is not None:
            add_rule(client, rule, rule.then.pop(0), as_json=as_json)
            return
        if deleted or delete_all:
            result = client.request("delete_rules", names=list(deleted))
        else:
            result = client.request("rules")
    rows = [
        (found["name"], found["on"], ", ".join(found["then"]), str(found["matched"]), str(found["fired"]))
        for found in result["rules"]
    ]
    header = ("DELETED" if deleted or delete_all else "RULE", "ON", "THEN", "MATCHED", "FIRED")
    emit(result, as_json, lambda: table(rows, header) if rows else "no rules")
