"""`inferwatch doctor`: looks at what an operator tends to forget, and says what to do. Reads only.

Each look is a function from the configuration to remarks, so that another one is a line here.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import typer

from collector.guards.check_record import FOLDER, Remark, look
from collector.guards.protocol import GuardRefused
from collector.guards.stack import GuardStack
from collector.signing import Signer, SigningKeyProblem, key_id_of
from inferwatch.config import Config, settings_digest


def guards(settings: Config, now: datetime) -> list[Remark]:
    """Whether the guards start, and what the newest record of a check is worth for them."""
    try:
        stack = GuardStack(settings.collector.guards)
    except GuardRefused as problem:
        return [Remark("bad", str(problem))]
    stack.close()
    revoked = {key_id for key_id, moment in settings.evidence.revoked.items() if moment <= now}
    trusted = {key_id_of(key): key for key in settings.evidence.signing_keys}
    file = settings.collector.evidence.signing_key_file
    try:
        own = None if file is None else Signer.load(file)
    except SigningKeyProblem as problem:
        return [Remark("bad", str(problem))]
    if own is not None:
        trusted[own.key_id] = own.public_key
    return look(
        settings.data_dir / FOLDER,
        now=now,
        versions=stack.versions,
        policy=settings_digest(settings.collector.guards),
        trusted={key_id: key for key_id, key in trusted.items() if key_id not in revoked},
    )


LOOKS: Final[Sequence[Callable[[Config, datetime], list[Remark]]]] = (guards,)


def run_doctor(settings: Config) -> int:
    """Prints every remark. 1 where something is broken or was tampered with, 0 otherwise."""
    remarks = [remark for one in LOOKS for remark in one(settings, datetime.now(UTC))]
    for remark in remarks:
        typer.echo(f"{remark.level:8}{remark.text}")
    return int(any(remark.level == "bad" for remark in remarks))
