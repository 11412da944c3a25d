from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sheily_train.core.branches.examples import Example, RowFormat, Turn
from sheily_train.core.training import data
from sheily_train.core.training.data import IGNORED, TokenRow
from sheily_train.errors import BaseModelError, DataError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "<|im_start|>", "<|im_end|>"
TALK = ("user", "¿Qué es la energía?", "assistant", "La capacidad.", "user", "¿Y el tiempo?", "assistant", "Otra cosa.")


def example(row_format: RowFormat, *words: str, source: str = "train.jsonl:1") -> Example:
    """Roles and contents in turn."""
    return Example(row_format, tuple(map(Turn, words[::2], words[1::2])), source)


def question(answer: str = "Un newton.", ask: str = "¿Qué es?", row_format: RowFormat = RowFormat.PROMPT) -> Example:
    return example(row_format, "user", ask, "assistant", answer)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """A new one for each test, which may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def beginning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts a begin-of-text token before every text, as Llama's."""
    return surround(tokenizer, f"{BEGIN} $A")


def surround(tokenizer: PreTrainedTokenizerBase, form: str) -> PreTrainedTokenizerBase:
    """Have the tokenizer put something before or after every text, which stands as ``$A`` in the form."""
    from tokenizers.processors import TemplateProcessing

    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BEGIN, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    return tokenizer


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[TokenRow]]:
    def tokenized(
        *examples: Example, template: str = "sheily", max_length: int = 200, most: int | None = None
    ) -> list[TokenRow]:
        return data.tokenize(examples, tokenizer, template=template, max_length=max_length, most=most)

    return tokenized


def learned(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the learned tokens, end-of-text tokens shown."""
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))
    text = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", ["sheily", "chat"])
@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (question(row_format=RowFormat.INSTRUCTION), f"Un newton.{END}"),
        (question(), f"Un newton.{END}"),
        (example(RowFormat.MESSAGES, "system", "Sé breve.", *TALK), f"La capacidad.{END}Otra cosa.{END}"),
        (example(RowFormat.CONVERSATIONS, *TALK), f"La capacidad.{END}Otra cosa.{END}"),
        (example(RowFormat.TEXT, "assistant", "Todo se aprende."), f"Todo se aprende.{END}"),
    ],
    ids=["instruction", "prompt", "messages", "conversations", "text"],
)
def test_answers_alone_are_learned_each_with_one_end_of_text(
    row: Example,
    answers: str,
    template: str,
    rows: Callable[..., list[TokenRow]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """In every format and template; every turn's answer is learned, and a text row from its first token on.

    Nothing foretells that first token, so it does not count.
    """
    (tokens,) = rows(row, template=template)
    assert learned(tokens, tokenizer) == answers
    foretold = len(tokenizer(answers, add_special_tokens=False).input_ids) - (row.format is RowFormat.TEXT)
    assert tokens.answer_tokens == foretold
    assert (IGNORED in tokens.labels) == (row.format is not RowFormat.TEXT)


def test_the_sheily_template_is_the_documented_text(
    rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Word for word, system and later turns included; prompt rows are put as they are."""
    first, second, plain = rows(
        question(row_format=RowFormat.INSTRUCTION),
        example(RowFormat.MESSAGES, "system", "Sé breve.", *TALK),
        question(),
    )
    assert tokenizer.decode([*first.ids]) == f"### Instrucción:\n¿Qué es?\n\n### Respuesta:\nUn newton.{END}"
    assert tokenizer.decode([*second.ids]) == (
        "Sé breve.\n\n### Instrucción:\n¿Qué es la energía?\n\n### Respuesta:\nLa capacidad."
        f"{END}\n\n### Instrucción:\n¿Y el tiempo?\n\n### Respuesta:\nOtra cosa.{END}"
    )
    assert tokenizer.decode([*plain.ids]) == f"¿Qué es?Un newton.{END}"


def test_the_chat_template_is_rendered_as_the_model_renders_it(
    rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The tokens are those of the template's own rendering of the whole talk, up to the last end-of-text."""
    (row,) = rows(example(RowFormat.MESSAGES, "system", "Sé breve.", *TALK), template="chat")
    roles, contents = ("system", *TALK[::2]), ("Sé breve.", *TALK[1::2])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert [*row.ids, *newline] == whole


def test_a_chat_template_that_closes_no_answer_still_teaches_the_end(
    rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where the template puts no end-of-text after an answer, one is added, so that the specialist stops."""
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (row,) = rows(example(RowFormat.MESSAGES, *TALK), template="chat")
    assert tokenizer.decode([*row.ids]) == f"[{TALK[1]}][{TALK[3]}]{END}[{TALK[5]}][{TALK[7]}]{END}"
    assert learned(row, tokenizer) == f"[{TALK[3]}]{END}[{TALK[7]}]{END}"


@pytest.mark.parametrize("template", ["sheily", "chat"])
def test_an_answer_that_quotes_end_of_text_is_not_cut_there(
    template: str, rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Nothing of an answer is lost in silence."""
    (row,) = rows(question(f"Uno {END} dos."), template=template)
    assert learned(row, tokenizer) == f"Uno {END} dos.{END}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '…' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
    ],
    ids=["forgets answers", "opens answers otherwise"],
)
def test_a_chat_template_that_rewrites_the_past_is_refused(
    template: str, rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """No span of such a rendering belongs to one answer: the message names the row and the way out."""
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"train.jsonl:7.*plantilla") as caught:
        rows(example(RowFormat.MESSAGES, *TALK, source="train.jsonl:7"), template="chat")
    assert "--template sheily" in caught.value.mend


def test_a_tokenizer_without_end_of_text_is_refused(
    rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The specialist could never learn to stop."""
    tokenizer.eos_token = None
    with pytest.raises(BaseModelError, match="fin de texto"):
        rows(question())


def test_a_tokenizer_without_chat_template_is_refused(
    rows: Callable[..., list[TokenRow]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """With the template that needs none."""
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="plantilla de chat") as caught:
        rows(question(), template="chat")
    assert "--template sheily" in caught.value.mend


@pytest.mark.parametrize("row_format", [RowFormat.INSTRUCTION, RowFormat.PROMPT, RowFormat.TEXT])
def test_begin_of_text_stands_first_and_is_not_learned(
    row_format: RowFormat, beginning: PreTrainedTokenizerBase, rows: Callable[..., list[TokenRow]]
) -> None:
    """Once, where the tokenizer puts one."""
    row = example(row_format, "assistant", "Hola.") if row_format is RowFormat.TEXT else question(row_format=row_format)
    (tokens,) = rows(row)
    begin = beginning.convert_tokens_to_ids(BEGIN)
    assert [index for index, token in enumerate(tokens.ids) if token == begin] == [0]
    assert tokens.labels[0] == IGNORED


def test_a_chat_template_writes_its_own_beginning(
    beginning: PreTrainedTokenizerBase, rows: Callable[..., list[TokenRow]]
) -> None:
    """No second begin-of-text is put before it."""
    (row,) = rows(question(), template="chat")
    assert beginning.decode([*row.ids]).count(BEGIN) == 2  # the user's and the assistant's


def test_a_long_prompt_loses_its_start_alone(
    beginning: PreTrainedTokenizerBase, rows: Callable[..., list[TokenRow]]
) -> None:
    """Begin-of-text, the prompt's end and the whole answer stay; the row is exactly as long as allowed."""
    row = question(ask="¿Qué es la energía? " * 10)
    (whole,), (cut,) = rows(row), rows(row, max_length=40)
    assert len(whole.ids) > len(cut.ids) == 40
    assert cut.ids == whole.ids[:1] + whole.ids[-39:]
    assert cut.labels == whole.labels[:1] + whole.labels[-39:]
    assert learned(cut, beginning) == f"Un newton.{END}"


def test_a_prompt_is_cut_to_eight_tokens_at_the_least(
    beginning: PreTrainedTokenizerBase, rows: Callable[..., list[TokenRow]]
) -> None:
    """One token fewer is a refusal, not a row that answers to nothing."""
    row = question(ask="¿Qué es la energía? " * 10)
    (whole,) = rows(row)
    least = 1 + 8 + whole.answer_tokens
    assert len(rows(row, max_length=least)[0].ids) == least
    with pytest.raises(DataError):
        rows(row, max_length=least - 1)


@pytest.mark.parametrize(
    "long",
    [
        question("La energía es la capacidad. " * 30),
        example(RowFormat.TEXT, "assistant", "La energía es la capacidad. " * 30),
        example(RowFormat.MESSAGES, *TALK[:2], "assistant", "La energía. " * 60, *TALK[4:]),
    ],
    ids=["prompt", "text", "first answer of two"],
)
def test_a_row_whose_answers_do_not_fit_is_refused_with_its_place(
    long: Example, rows: Callable[..., list[TokenRow]]
) -> None:
    """The message gives file:line and tokens of the first five, counts the rest, and names a length that would do."""
    (whole,) = rows(long, max_length=10_000)
    bad = [Example(long.format, long.turns, f"train.jsonl:{line}") for line in range(2, 9)]
    with pytest.raises(DataError, match="no cabe en 60 tokens") as caught:
        rows(question(), *bad, max_length=60)
    assert f"train.jsonl:2: {len(whole.ids)} tokens; train.jsonl:3: " in caught.value.message
    assert caught.value.message.endswith(f"train.jsonl:6: {len(whole.ids)} tokens y 2 más.")
    assert f"--max-length a {len(whole.ids)}" in caught.value.mend
    with pytest.raises(DataError) as caught:
        rows(question(), *bad, max_length=60, most=len(whole.ids) - 1)
    assert caught.value.mend == "Acorta esas filas: el modelo no admite más."


@pytest.mark.parametrize("template", ["sheily", "chat"])
@pytest.mark.parametrize("row_format", [RowFormat.INSTRUCTION, RowFormat.PROMPT, RowFormat.MESSAGES])
@pytest.mark.parametrize("surrounded", ["$A", f"{BEGIN} $A", f"{BEGIN} $A {END}", f"$A {END}"])
def test_a_question_is_put_as_the_training_rows_were(
    surrounded: str,
    row_format: RowFormat,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Callable[..., list[TokenRow]],
) -> None:
    """The prompt's tokens are those before the answer of the training row with that question, whatever the tokenizer
    puts around a text: a prompt that ended it would have no answer."""
    surround(tokenizer, surrounded)
    (row,) = rows(question(row_format=row_format), template=template)
    prompt = data.render_prompt([Turn("user", "¿Qué es?")], row_format, template, tokenizer)
    asked = data.prompt_tokens(prompt, template, tokenizer)
    assert asked == [t for t, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]


def test_text_is_continued_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """After text rows, a question has no form around it."""
    assert data.render_prompt([Turn("user", "Érase")], RowFormat.TEXT, "chat", tokenizer) == "Érase"


def test_no_examples_give_no_rows(rows: Callable[..., list[TokenRow]]) -> None:
    """A branch without held-out rows has none."""
    assert rows() == []


def test_padding_is_never_learned_and_the_end_of_text_is(
    tokenizer: PreTrainedTokenizerBase, rows: Callable[..., list[TokenRow]]
) -> None:
    """The short row keeps its own end-of-text label; its padding is masked and ignored."""
    short, long = rows(question("No."), question("La energía es la capacidad."))
    end = tokenizer.eos_token_id
    batch = data.collate([short, long])
    size = len(short.ids)
    assert batch.ids_BT.shape == batch.mask_BT.shape == batch.labels_BT.shape == (2, len(long.ids))
    assert batch.ids_BT[0].tolist() == [*short.ids, *[0] * (len(long.ids) - size)]
    assert batch.mask_BT.sum(1).tolist() == [size, len(long.ids)]
    assert batch.mask_BT[0, :size].all()
    assert batch.labels_BT[0, size - 1] == end
    assert (batch.labels_BT[0, size:] == IGNORED).all()
    assert batch.labels_BT[1].tolist() == list(long.labels)
    assert batch.ids_BT.dtype == torch.int64


def test_a_tokenizer_without_padding_token_fills_with_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its own where it has one."""
    tokenizer.pad_token = "<|endoftext|>"
    assert data.pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.pad_token = None
    assert data.pad_id(tokenizer) == tokenizer.eos_token_id


def blank_rows(lengths: Sequence[int]) -> list[TokenRow]:
    return [TokenRow((0,) * length, (0,) * length, f"x:{index}") for index, length in enumerate(lengths)]


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 300))
def test_groups_keep_every_row_and_the_limit(lengths: list[int], limit: int) -> None:
    """Each row is in one group; a group's padded size is within the limit unless it is a single row."""
    rows = blank_rows(lengths)
    groups = data.split_by_tokens(rows, limit)
    assert sorted(row.source for group in groups for row in group) == sorted(row.source for row in rows)
    assert all(len(group) == 1 or len(group) * max(len(row.ids) for row in group) <= limit for group in groups)


def test_groups_are_no_more_than_needed() -> None:
    """Rows of like length go together, as many as the limit allows."""
    groups = data.split_by_tokens(blank_rows([10, 40, 10, 40, 10, 10]), 80)
    assert [[len(row.ids) for row in group] for group in groups] == [[40, 40], [10, 10, 10, 10]]


@hypothesis_settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_an_epochs_order_is_a_permutation_and_the_same_each_time(count: int, seed: int, epoch: int) -> None:
    """Every row once, decided by seed and epoch, whatever was drawn before."""
    order = data.epoch_order(count, seed, epoch)
    torch.rand(1)
    data.epoch_order.cache_clear()
    assert sorted(order) == list(range(count))
    assert order == data.epoch_order(count, seed, epoch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """No two of them alike."""
    orders = {data.epoch_order(50, seed, epoch) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
