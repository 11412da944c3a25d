"""Snapshots of a run that are whole or absent, and the one file in which a run travels.

A run's whole state is one safetensors file: the learner's tensors, and in the metadata, as JSON, what is known of the
run (ledger, statistics, fingerprint). On the disk it lies in a folder ``snapshot-000000000042`` beside a
``manifest.json`` with its sha256. It is written under a temporary name, fsynced, the manifest last; then the folder is
renamed and its parent fsynced. The newest one whose hash verifies is the one that is loaded; three are kept. Nothing is
ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_torch_tensors
from safetensors.torch import save as pack_torch_tensors

from sheily_train.durable import make_folder, read_json, save_tensors, sha256_file, sync_folder, write_json
from sheily_train.errors import RefusedError
from sheily_train.i18n import _

SNAPSHOTS_KEPT = 3
MAX_SNAPSHOT_HEADER = 8 * 1024 * 1024
MAX_SNAPSHOT_SEQ = 10**12 - 1
"""The last event whose number fits a folder's name; a snapshot of a later one would never be found again."""
UNFINISHED_SNAPSHOT = ".unfinished"

_SNAPSHOT_FILE, _SNAPSHOT_MANIFEST, _FACTS_KEY = "state.safetensors", "manifest.json", "run"


@dataclass(frozen=True)
class Snapshot:
    """A run's whole state after event ``seq``: JSON values, and the learner's tensors by name."""

    seq: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """The snapshot as one safetensors file; the same snapshot gives the same bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    return pack_torch_tensors(tensors, metadata=_snapshot_metadata(snapshot))


def unpack_snapshot(content: bytes) -> Snapshot:
    """The snapshot that :func:`pack_snapshot` packed; anything else raises :class:`RefusedError`."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MAX_SNAPSHOT_HEADER, len(content) - 8):
        raise _no_snapshot()
    facts = _facts_in_header(content[8 : 8 + size])
    try:
        return Snapshot(facts["seq"], facts, load_torch_tensors(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _no_snapshot() from error


class Snapshots:
    """The snapshots of one run, in a folder of their own. One thread at a time may save or load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, and drop all but the newest three up to it.

        Later ones belong to a history that was left (they did not verify, or an older state was put in their place).
        Raises :class:`OSError` when it cannot be written; the earlier snapshots are then intact.
        """
        make_folder(self.folder)
        final, temporary = self.folder / f"snapshot-{snapshot.seq:012d}", self.folder / UNFINISHED_SNAPSHOT
        self.remove_leftovers()
        try:
            temporary.mkdir()
            save_tensors(temporary / _SNAPSHOT_FILE, snapshot.tensors, _snapshot_metadata(snapshot))
            write_json(temporary / _SNAPSHOT_MANIFEST, _manifest_of(temporary))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except BaseException:
            self.remove_leftovers()
            raise
        sync_folder(self.folder)
        kept = [path for path in self.folders() if path <= final][-SNAPSHOTS_KEPT:]
        for other in set(self.folders()) - set(kept):
            shutil.rmtree(other, ignore_errors=True)

    def newest(self) -> tuple[Snapshot | None, list[Path]]:
        """The newest snapshot that verifies (or none), and the newer ones that did not and were passed over."""
        self.remove_leftovers()
        damaged: list[Path] = []
        for folder in reversed(self.folders()):
            if snapshot := _verified_snapshot(folder):
                return snapshot, damaged
            damaged.append(folder)
        return None, damaged

    def newest_facts(self, *, verified: bool = False) -> dict[str, Any] | None:
        """What the newest snapshot's header says of the run; unverified it may be shown, but not relied on."""
        for folder in reversed(self.folders()):
            try:
                if verified and read_json(folder / _SNAPSHOT_MANIFEST) != _manifest_of(folder):
                    continue
                with (folder / _SNAPSHOT_FILE).open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    return _facts_in_header(file.read(min(size, MAX_SNAPSHOT_HEADER)))
            except (OSError, RefusedError):
                continue
        return None

    def folders(self) -> list[Path]:
        """The finished snapshots, oldest first."""
        return sorted(self.folder.glob("snapshot-????????????"))

    def remove_leftovers(self) -> None:
        """Remove what a killed write left."""
        shutil.rmtree(self.folder / UNFINISHED_SNAPSHOT, ignore_errors=True)


def _manifest_of(folder: Path) -> dict[str, str]:
    return {_SNAPSHOT_FILE: sha256_file(folder / _SNAPSHOT_FILE)}


def _facts_in_header(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_each_once)
        facts: dict[str, Any] = orjson.loads(entries["__metadata__"][_FACTS_KEY])
        if type(facts["seq"]) is int and 0 <= facts["seq"] <= MAX_SNAPSHOT_SEQ:
            return facts
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _no_snapshot()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands in it twice, two readers could take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _verified_snapshot(folder: Path) -> Snapshot | None:
    manifest = read_json(folder / _SNAPSHOT_MANIFEST)
    try:
        content = (folder / _SNAPSHOT_FILE).read_bytes()
        if manifest != {_SNAPSHOT_FILE: hashlib.sha256(content).hexdigest()}:
            return None
        return unpack_snapshot(content)
    except (OSError, RefusedError):
        return None


def _snapshot_metadata(snapshot: Snapshot) -> dict[str, str]:
    """One key only: safetensors does not keep the order of several."""
    return {_FACTS_KEY: orjson.dumps({**snapshot.facts, "seq": snapshot.seq}, option=orjson.OPT_SORT_KEYS).decode()}


def _no_snapshot() -> RefusedError:
    return RefusedError(
        _("El archivo no es el estado entero de un entrenamiento."),
        mend=_("Usa un archivo tal como lo dio GET /state."),
    )
