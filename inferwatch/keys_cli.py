"""`inferwatch keys`: tenants' keys and their epochs, API keys of clients, keys of operators."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

import orjson
import typer

from inferwatch.config import load
from inferwatch.findings_cli import KeyOption, OperatorOption, ReasonOption
from inferwatch.options import ConfigOption, JsonOption

app = typer.Typer(no_args_is_help=True, help="Make, rotate, revoke and destroy keys.")

TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]
KeyIdArgument = Annotated[str, typer.Argument(help="The id of the API key, as the file has it.")]
ExpiresOption = Annotated[str, typer.Option(help="When it ends from now: 12h, 90d. Left out: never.")]
BoundOption = Annotated[int, typer.Option(min=0, help="A limit of its own; 0: that of the configuration.")]


@app.command("create")
def create(tenant: TenantArgument = "default", config: ConfigOption = None) -> None:
    """Make the key that a tenant's hashes and pseudonyms are under.

    Example: inferwatch keys create default
    """
    from inferwatch.keys import create_tenant_key  # noqa: PLC0415  # each command loads its own room

    typer.echo(f"Made {create_tenant_key(load(config).collector.identity.key_dir, tenant)}")


@app.command("api")
def api(
    user: Annotated[str, typer.Option(help="Whose key it is.")],
    *,
    tenant: Annotated[str, typer.Option(help="The tenant.")] = "default",
    on_behalf: Annotated[bool, typer.Option("--on-behalf", help="It may name the users it speaks for.")] = False,
    expires: ExpiresOption = "",
    requests_per_minute: BoundOption = 0,
    tokens_per_minute: BoundOption = 0,
    concurrent: BoundOption = 0,
    body_bytes_max: BoundOption = 0,
    config: ConfigOption = None,
) -> None:
    """Make an API key: its digest goes into the file of API keys, the secret is printed once.

    Example: inferwatch keys api --user alice --expires 90d --requests-per-minute 600
    """
    from collector.limits import Limit  # noqa: PLC0415
    from inferwatch.keys import add_api_key  # noqa: PLC0415

    file = load(config).collector.identity.api_keys_file
    bounds = (requests_per_minute, tokens_per_minute, concurrent, body_bytes_max)
    limit = Limit(*(bound or None for bound in bounds)) if any(bounds) else None
    secret, key_id = add_api_key(
        file, tenant=tenant, user=user, on_behalf=on_behalf, expires=_from_now(expires), limit=limit
    )
    typer.echo(f"{key_id} was added to {file}. The key, shown only now:", err=True)
    typer.echo(secret)


@app.command("renew")
def renew(
    key_id: KeyIdArgument,
    overlap: Annotated[str, typer.Option(help="How long the old key stays good: 12h, 7d.")] = "7d",
    expires: ExpiresOption = "",
    config: ConfigOption = None,
) -> None:
    """Make a second key for the same owner; the old one ends after the overlap, if not sooner. No restart.

    Example: inferwatch keys renew key_0a1b2c3d4e5f --overlap 7d --expires 90d
    """
    from inferwatch.keys import successor  # noqa: PLC0415

    file, ends = load(config).collector.identity.api_keys_file, _from_now(overlap)
    assert ends is not None  # noqa: S101  # an overlap always has a length
    secret, new_id, ends = successor(file, key_id, ends, expires=_from_now(expires))
    typer.echo(f"{new_id} was added to {file}; {key_id} ends at {ends:%Y-%m-%d %H:%M} UTC. Shown only now:", err=True)
    typer.echo(secret)


@app.command("revoke")
def revoke(key_id: KeyIdArgument, config: ConfigOption = None) -> None:
    """Refuse an API key from now on: running collectors see it within `reload_s`, and tell of its use.

    Example: inferwatch keys revoke key_0a1b2c3d4e5f
    """
    from inferwatch.keys import change_api_key  # noqa: PLC0415

    identity = load(config).collector.identity
    change_api_key(identity.api_keys_file, key_id, "revoked", value=True)
    typer.echo(f"{key_id} is revoked; running collectors refuse it within {identity.reload_s:g} s.")


@app.command("epochs")
def show_epochs(tenant: TenantArgument = "default", config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the epochs of a tenant's key that are left, oldest first.

    Example: inferwatch keys epochs default
    """
    from collector.epochs import epochs  # noqa: PLC0415

    found = epochs(load(config).collector.identity.key_dir, tenant)
    if as_json:
        rows = [{"epoch": each.name, "begun": each.begun, "current": each.current} for each in found]
        typer.echo(orjson.dumps(rows).decode())
        return
    for each in found:
        typer.echo(f"{each.name}  {each.begun:%Y-%m-%d %H:%M} UTC{'  current' if each.current else ''}")


@app.command("rotate")
def rotate_epoch(
    tenant: TenantArgument,
    early: Annotated[bool, typer.Option("--early", help="Though the current epoch is young.")] = False,
    config: ConfigOption = None,
) -> None:
    """Begin a new epoch of a tenant's key. Running collectors go over to it by themselves, and tell of it.

    The old key stays, so that `inferwatch lookup` reaches back. People have another pseudonym from now on.

    Example: inferwatch keys rotate default
    """
    from collector.epochs import DAY_S, rotate  # noqa: PLC0415

    identity = load(config).collector.identity
    age_min_s = 0 if early else identity.epoch_days_min * DAY_S
    before, after = rotate(identity.key_dir, tenant, now_s=time.time(), age_min_s=age_min_s)
    typer.echo(f"{tenant} is in epoch {after}; the key of {before} is kept. Copy both to every host of this tenant.")


@app.command("shred")
def shred_epoch(
    tenant: TenantArgument,
    epoch: Annotated[str, typer.Argument(help="The epoch, e_ and eight digits.")],
    *,
    reason: ReasonOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Destroy the key of an earlier epoch, so that nobody can link its events to people or texts any more.

    It is recorded, signed, on iw.commands before the key is touched. It can't be undone.

    Example: inferwatch keys shred default e_79336975 --reason "retention, 13 months"
    """
    from collector.epochs import find, shred  # noqa: PLC0415
    from detectors.commands import Shred  # noqa: PLC0415
    from inferwatch.commands import make, operator_of, send  # noqa: PLC0415

    settings = load(config)
    identity = settings.collector.identity
    overlap_s = identity.epoch_overlap_s + identity.reload_s
    found = find(identity.key_dir, tenant, epoch, now_s=time.time(), overlap_s=overlap_s)
    who = operator_of(settings, operator, key)
    if not yes:
        typer.echo(f"{found.path} has been the key of {tenant} since {found.begun:%Y-%m-%d}. This can't be undone.")
        if typer.prompt("Type the epoch to destroy its key") != epoch:
            raise typer.Exit(1)
    asyncio.run(send(settings, who, make(Shred, who, tenant, reason, epoch=epoch)))
    shred(found)
    typer.echo(f"The key of {epoch} is destroyed here. Copies on other hosts and in backups are yours to destroy.")


@app.command("operator")
def operator_key(name: Annotated[str, typer.Argument(help="Who commands.")], config: ConfigOption = None) -> None:
    """Make the key that an operator signs commands with, and print the lines that make it known.

    Example: inferwatch keys operator alice
    """
    from inferwatch.operators import FOLDER, create_operator_key  # noqa: PLC0415

    file, public = create_operator_key(load(config).data_dir / FOLDER, name)
    typer.echo(f"Made {file}: keep it to yourself. Put this into inferwatch.toml, where stage 2 runs too:", err=True)
    typer.echo(f'[detect.commands.operators]\n"{name}" = "{public}"')


def _from_now(length: str) -> datetime | None:
    from inferwatch.commands import seconds_of  # noqa: PLC0415

    return datetime.now(UTC) + timedelta(seconds=seconds_of(length)) if length else None


@app.command("signing")
def signing(
    rotate: Annotated[bool, typer.Option("--rotate", help="Replace the key; the old one signs the new one.")] = False,
    config: ConfigOption = None,
) -> None:
    """Make the key that the collector signs checkpoints with, and print what makes it known where logs are verified.

    A running collector takes up a rotated key by itself, with the next checkpoint.

    Example: inferwatch keys signing
    """
    from collector.signing import create_signing_key, rotate_signing_key  # noqa: PLC0415

    file = load(config).collector.evidence.signing_key_file
    if file is None:
        raise ValueError("no place for the signing key is configured: set collector.evidence.signing_key_file")
    signer = rotate_signing_key(file) if rotate else create_signing_key(file)
    typer.echo(f"Made {file}, key {signer.key_id}. Add its public half where logs are verified:", err=True)
    typer.echo(f'[evidence]\nsigning_keys = ["{signer.public_key}"]')
