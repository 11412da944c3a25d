"""From a branch's examples to batches of tokens: templates, answer masks, order.

Shapes: B rows, T tokens (padded), as suffixes of tensor names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from sheily_train.core.branches.examples import Example, RowFormat, Turn
from sheily_train.errors import BaseModelError, DataError, RequestError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned, as in PyTorch's cross entropy."""

_SHOWN_PROBLEMS = 5
_KEPT_PROMPT_TOKENS = 8
"""A prompt that is cut keeps at least this many of its last tokens."""


class Segment(NamedTuple):
    """A piece of an example's text; when it is learned, so is the end-of-text token after it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class TokenRow:
    """One example as tokens. ``labels`` equals ``ids`` where a token is learned and ``IGNORED`` elsewhere."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: str

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learned; nothing foretells the first one."""
        return sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """Rows padded on the right to the longest: ids, attention mask (1 real, 0 padding), labels."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    labels_BT: torch.Tensor


def render_prompt(
    turns: Sequence[Turn], row_format: RowFormat, template: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text that stands before the answer to the last user turn."""
    if row_format is RowFormat.TEXT:
        return turns[-1].content
    if template == "chat":
        return _apply_chat(turns, tokenizer, generation=True)
    if row_format is RowFormat.PROMPT:
        return turns[-1].content
    return "".join(_sheily_turn(turn) for turn in turns)


def _sheily_turn(turn: Turn) -> str:
    if turn.role == "user":
        return f"### Instrucción:\n{turn.content}\n\n### Respuesta:\n"
    return f"{turn.content}\n\n"


def _apply_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generation: bool) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise RequestError(
            _("La plantilla de chat del modelo no admite una conversación {roles}: {error}.").format(
                roles=roles, error=error
            ),
            mend=_("Usa --template sheily."),
        ) from error


def render(example: Example, template: str, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """An example's text, in which every answer is learned up to and with the end-of-text token."""
    if template == "chat" and example.format is not RowFormat.TEXT:
        return _render_chat(example, tokenizer)
    segments: list[Segment] = []
    for turn in example.turns:
        if turn.role == "assistant":
            segments.append(Segment(turn.content, True))
        elif example.format is RowFormat.PROMPT:
            segments.append(Segment(turn.content, False))
        else:
            opening = "\n\n" if segments and segments[-1].learned else ""
            segments.append(Segment(opening + _sheily_turn(turn), False))
    return segments


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    end = str(tokenizer.eos_token)
    segments: list[Segment] = []
    done = ""
    for index, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        prompt = _apply_chat(example.turns[:index], tokenizer, generation=True)
        whole = _apply_chat(example.turns[: index + 1], tokenizer, generation=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError(
                _(
                    "{source}: la plantilla de chat del modelo cambia el comienzo de una conversación al alargarla."
                ).format(source=example.source),
                mend=_("Usa --template sheily."),
            )
        tail = whole[len(prompt) :]
        answer, closing, rest = tail.rpartition(end) if end in tail else (tail, "", "")
        segments += [Segment(prompt[len(done) :], False), Segment(answer, True)]
        done = whole.removesuffix(rest) if closing else whole
    return segments


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    most: int | None = None,
) -> list[TokenRow]:
    """Tokens and labels of every example.

    A row longer than ``max_length`` tokens loses the start of its prompt. One whose answer leaves no room for a prompt
    is refused with its file and line: a cut answer would teach the model to stop in the middle, an emptied one nothing.
    ``most`` is what ``max_length`` can be raised to, where there is a limit.
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(_("El tokenizador del modelo base no tiene token de fin de texto."))
    if template == "chat" and not tokenizer.chat_template:
        raise RequestError(_("El modelo base no trae plantilla de chat."), mend=_("Usa --template sheily."))
    rendered = [render(example, template, tokenizer) for example in examples]
    texts = [segment.text for segments in rendered for segment in segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    opening = _opening_tokens(tokenizer, template)
    rows, refused = [], []
    for example, segments in zip(examples, rendered, strict=True):
        ids, labels = list(opening), [IGNORED] * len(opening)
        for segment in segments:
            piece = next(pieces) + ([tokenizer.eos_token_id] if segment.learned else [])
            ids += piece
            labels += piece if segment.learned else [IGNORED] * len(piece)
        row = _fit(TokenRow(tuple(ids), tuple(labels), example.source), len(opening), max_length)
        if row is None:
            refused.append((example.source, len(ids)))
        else:
            rows.append(row)
    if refused:
        raise _too_long(refused, max_length, most)
    return rows


def prompt_tokens(prompt: str, template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens, as :func:`tokenize` puts them before an answer; nothing ends the text there."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    return _opening_tokens(tokenizer, template) + ids


def _opening_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The begin-of-text token, for tokenizers that put one; a chat template writes its own."""
    begin = tokenizer.bos_token_id
    if template == "chat" or begin is None or tokenizer("a").input_ids[:1] != [begin]:
        return []
    return [begin]


def _fit(row: TokenRow, opening: int, max_length: int) -> TokenRow | None:
    excess = len(row.ids) - max_length
    if excess <= 0:
        return row
    prompt = next(index for index, label in enumerate(row.labels) if label != IGNORED)
    if prompt - opening - excess < _KEPT_PROMPT_TOKENS:
        return None
    cut = opening + excess
    return TokenRow(row.ids[:opening] + row.ids[cut:], row.labels[:opening] + row.labels[cut:], row.source)


def _too_long(refused: Sequence[tuple[str, int]], max_length: int, most: int | None) -> DataError:
    lines = "; ".join(_("{source}: {found} tokens").format(source=s, found=n) for s, n in refused[:_SHOWN_PROBLEMS])
    more = len(refused) - _SHOWN_PROBLEMS
    if more > 0:
        lines += _(" y {more} más").format(more=more)
    longest = max(found for _source, found in refused)
    if most is None or longest <= most:
        mend = _("Acorta esas filas o sube --max-length a {longest}.").format(longest=longest)
    else:
        mend = _("Acorta esas filas: el modelo no admite más.")
    return DataError(
        _("Filas cuya respuesta no cabe en {limit} tokens: {lines}.").format(limit=max_length, lines=lines),
        mend=mend,
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills short rows: the tokenizer's own, else end-of-text (it is masked, and never learned)."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of ``range(count)`` that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(count, generator=generator).tolist())


def padded_size(rows: Sequence[TokenRow]) -> int:
    """Tokens of rows when each is padded to the longest."""
    return max(len(row.ids) for row in rows) * len(rows)


def split_by_tokens(rows: Sequence[TokenRow], max_tokens: int) -> list[list[TokenRow]]:
    """The rows, longest first, in groups whose padded size is at most ``max_tokens`` (or that hold a single row)."""
    groups: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if groups and padded_size(groups[-1]) + len(groups[-1][0].ids) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


Pass = list[tuple[int, list[TokenRow]]]
"""What goes through a model at once: rows, each group of them with the number of the batch it comes from."""


def split_into_passes(batches: Sequence[Sequence[TokenRow]], max_tokens: int) -> list[Pass]:
    """The rows of batches, in passes whose padded size is at most ``max_tokens`` (or that hold a single row)."""
    passes: list[Pass] = []
    for number, batch in enumerate(batches):
        for rows in split_by_tokens(batch, max_tokens):
            piece = (number, rows)
            if len(batches) > 1 and passes and pass_size([*passes[-1], piece]) <= max_tokens:
                passes[-1].append(piece)
            else:
                passes.append([piece])
    return passes


def pass_size(pieces: Pass) -> int:
    """Tokens of a pass when each row is padded to the longest."""
    return padded_size([row for _number, rows in pieces for row in rows])


def collate(rows: Sequence[TokenRow], device: str | torch.device = "cpu") -> Batch:
    """Rows as one padded batch. What stands in the padding is token 0: it is masked, and never learned."""
    longest = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in values], device=device)

    return Batch(
        padded([row.ids for row in rows], 0),
        padded([[1] * len(row.ids) for row in rows], 0),
        padded([row.labels for row in rows], IGNORED),
    )
