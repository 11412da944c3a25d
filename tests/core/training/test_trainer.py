"""Training one branch of a tiny model, from request to folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sheily_train import durable, paths, runlog
from sheily_train.core.branches import catalog
from sheily_train.core.training import bases, specialist
from sheily_train.core.training.adapters import quiet_peft
from sheily_train.core.training.evaluation import compare_with_base
from sheily_train.core.training.export import merge_specialist
from sheily_train.core.training.request import TrainRequest, resolve
from sheily_train.core.training.run import Run
from sheily_train.core.training.trainer import quick_test, train_model
from sheily_train.errors import DataError, Interrupted, RequestError, ResourceError, TrainingError
from sheily_train.runlog import Record
from tests.full_disk import full_disk_after
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture
def lora(home: Path, tiny_llama: Path) -> TrainRequest:
    return TrainRequest(branch="physics", model=str(tiny_llama), lora=True, epochs=2, batch_size=4, lr=1e-2)


def records(log: Path, event: str) -> list[Record]:
    return list(runlog.read(log, event))


def test_a_lora_run_leaves_every_file_of_the_contract(lora: TrainRequest, home: Path) -> None:
    """The model folder holds PEFT's files, tokenizer, request, metrics and card; the logs lie beside each other."""
    result = train_model(lora)
    assert result.folder == home / "var" / "central_models" / "physics"
    names = {path.name for path in result.folder.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_config.json",
        "training_metrics.json",
        "README.md",
    } <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".tmp"))}
    metrics = durable.read_json(result.folder / paths.TRAINING_METRICS)
    assert metrics == result.metrics
    before, after = metrics["heldout_before"], metrics["heldout_after"]
    assert after["loss"] < before["loss"]
    assert after["perplexity"] == pytest.approx(2.718281828459045 ** after["loss"])
    assert (metrics["examples"], metrics["heldout_examples"], metrics["steps"]) == (12, 4, 6)
    steps = records(result.log, "step")
    assert metrics["tokens"] == sum(step["tokens"] for step in steps)
    assert metrics["timing"]["seconds"] > 0
    assert result.log.parent == home / "var" / "central_logs"
    text = result.log.with_suffix(".log").read_text()
    assert f"pérdida reservada {after['loss']:.4f}" in text
    card = (result.folder / paths.MODEL_CARD).read_text()
    assert f"{after['loss']:.4f}" in card
    assert card.startswith("---\n")
    assert not list(paths.work_dir(result.folder).glob("*/run.json"))


def test_a_full_run_leaves_a_model_that_transformers_loads(lora: TrainRequest) -> None:
    """Without LoRA every weight learns, and the folder loads with from_pretrained to the same held-out loss."""
    result = train_model(replace(lora, lora=False, lr=1e-3))
    assert (result.folder / paths.MODEL_WEIGHTS).is_file()
    assert not (result.folder / paths.ADAPTER_WEIGHTS).exists()
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    base = AutoModelForCausalLM.from_pretrained(lora.model)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))]
    assert len(changed) == len(list(model.named_parameters()))
    measured = compare_with_base("physics", lora.branches_dir, result.folder)
    assert measured["specialist"]["loss"] == pytest.approx(result.metrics["heldout_after"]["loss"], rel=1e-2)
    assert measured["base"]["loss"] == pytest.approx(result.metrics["heldout_before"]["loss"], rel=1e-2)


def test_a_specialist_learns_to_answer_and_to_stop(lora: TrainRequest) -> None:
    """After enough passes the model gives a training answer to the letter and ends it by itself."""
    result = train_model(replace(lora, lora=False, lr=3e-3, epochs=60, precision="fp32"))
    assert quick_test(result.folder, "physics", "¿Qué mide un termómetro?") == "La temperatura."
    assert quick_test(result.folder, "physics", "¿Qué es un voltio?").endswith("eléctrico.")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_any_causal_lm_takes_an_adapter(architecture: str, lora: TrainRequest, tmp_path: Path) -> None:
    """LoRA finds layers by itself in six families and in one whose layers have other names."""
    folder = tmp_path / architecture
    if architecture == "gpt2":
        tokenizer = tiny_tokenizer(folder)
        sizes = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2)
        GPT2LMHeadModel(sizes).save_pretrained(folder)
    else:
        tiny_model(folder, architecture)
    result = train_model(replace(lora, model=str(folder)))
    assert result.metrics["heldout_after"]["loss"] < result.metrics["heldout_before"]["loss"]


def test_the_same_request_again_is_skipped_and_fresh_repeats_it(lora: TrainRequest) -> None:
    """A finished request is not trained twice unless asked, and then gives the same bits."""
    first = train_model(lora)
    weights = (first.folder / paths.ADAPTER_WEIGHTS).read_bytes()
    again = train_model(lora)
    assert (again.skipped, again.metrics, again.log) == (True, first.metrics, first.log)
    fresh = train_model(lora, fresh=True)
    assert not fresh.skipped
    assert fresh.log != first.log
    assert (fresh.folder / paths.ADAPTER_WEIGHTS).read_bytes() == weights
    assert runlog.deterministic_lines(fresh.log) == runlog.deterministic_lines(first.log)


def test_another_seed_gives_another_model(lora: TrainRequest) -> None:
    """The seed decides order and adapter: changing it changes the weights."""
    one, other = (train_model(replace(lora, seed=seed)).folder / paths.ADAPTER_WEIGHTS for seed in (0, 1))
    assert one == other
    first = one.read_bytes()
    train_model(lora)
    assert one.read_bytes() != first


def test_training_config_repeats_the_run(lora: TrainRequest, home: Path, tmp_path: Path) -> None:
    """--config training_config.json leads to the same bits, in another folder if asked."""
    first = train_model(replace(lora, lora_dropout=0.2, epochs=1.5))
    given = resolve({"output": str(tmp_path / "again")}, {}, first.folder / paths.TRAINING_CONFIG)
    again = train_model(TrainRequest(**given))
    assert again.folder == tmp_path / "again"
    for name in (paths.ADAPTER_WEIGHTS, paths.ADAPTER_CONFIG):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert runlog.deterministic_lines(again.log) == runlog.deterministic_lines(first.log)


def test_a_base_given_by_a_relative_path_is_found_from_anywhere(
    lora: TrainRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The specialist is asked in another folder than it was trained in."""
    monkeypatch.chdir(Path(lora.model).parent)
    folder = train_model(replace(lora, model=Path(lora.model).name, max_steps=1)).folder
    monkeypatch.chdir(tmp_path)
    assert isinstance(quick_test(folder, "physics", "¿Qué?", max_new_tokens=2), str)


def test_new_rows_make_the_model_stale(lora: TrainRequest) -> None:
    """The state is none, current after training, and stale when a row was added."""
    folder = lora.model_folder
    branch = catalog.find_branch(lora.branches_dir, "physics")
    assert specialist.state_of(folder, catalog.data_hash(branch)) == "none"
    train_model(lora)
    assert specialist.state_of(folder, catalog.data_hash(branch)) == "current"
    with branch.training_files[0].open("a") as file:
        file.write('{"instruction": "¿Qué mide un reloj?", "output": "El tiempo."}\n')
    assert specialist.state_of(folder, catalog.data_hash(branch)) == "stale"
    assert train_model(lora).metrics["examples"] == 13


def test_full_after_lora_leaves_no_old_adapter_and_keeps_foreign_files(lora: TrainRequest) -> None:
    """A new model replaces all of the earlier one's files and none of the user's own."""
    folder = train_model(lora).folder
    (folder / "notas.txt").write_text("mías")
    train_model(replace(lora, lora=False))
    assert not (folder / paths.ADAPTER_WEIGHTS).exists()
    assert not (folder / paths.ADAPTER_CONFIG).exists()
    assert (folder / paths.MODEL_WEIGHTS).is_file()
    assert (folder / "notas.txt").read_text() == "mías"


def test_early_stopping_keeps_the_best_weights(lora: TrainRequest) -> None:
    """Training stops after the asked passes without gain, and the result has the lowest held-out loss seen."""
    result = train_model(replace(lora, lora=False, lr=2e-2, epochs=30, schedule="constant", early_stopping=2))
    seen = [record["loss"] for record in records(result.log, "eval")]
    assert result.metrics["stopped_early"]
    assert result.metrics["steps"] < 90
    assert result.metrics["heldout_after"]["loss"] == min(seen)
    assert seen[-2] > seen[-1] == min(seen)


def test_a_branch_without_held_out_rows_trains_and_says_so(lora: TrainRequest, home: Path) -> None:
    """No evaluation data: no held-out numbers are made up, and early stopping is told to stop nothing."""
    shutil.rmtree(home / "all-Branches" / "physics" / "evaluation")
    result = train_model(replace(lora, early_stopping=1))
    assert "--early-stopping no para nada" in result.log.with_suffix(".log").read_text()
    assert result.metrics["heldout_before"] is None
    assert result.metrics["heldout_after"] is None
    assert "sin datos reservados" in (result.folder / paths.MODEL_CARD).read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_precision_learns(precision: str, method: str, lora: TrainRequest) -> None:
    """bf16, fp16 with loss scaling, and fp32 bring the loss down, with and without adapter."""
    asked = replace(lora, precision=precision, lora=method == "lora", lr=1e-2 if method == "lora" else 1e-3)
    result = train_model(asked)
    assert result.metrics["precision"] == precision
    assert result.metrics["heldout_after"]["loss"] < result.metrics["heldout_before"]["loss"]
    tensors = load_file(result.folder / (paths.ADAPTER_WEIGHTS if method == "lora" else paths.MODEL_WEIGHTS))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


class StopAt:
    """A listener that raises at a given step, as if the process died there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: Record) -> None:
        if record["event"] == "step" and record["step"] == self.step:
            raise Interrupted("prueba")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_going_on_is_exact_for_every_method(method: str, precision: str, lora: TrainRequest, tmp_path: Path) -> None:
    """Cut off between checkpoints, LoRA and full runs, with and without loss scaling, end in the same bits."""
    asked = replace(lora, lora=method == "lora", precision=precision, lora_dropout=0.1, save_steps=2, lr=3e-3)
    quiet = train_model(replace(asked, output=tmp_path / "quiet"))
    with pytest.raises(Interrupted):
        train_model(asked, listeners=(StopAt(5),))
    result = train_model(asked)
    assert [record["step"] for record in records(result.log, "resume")] == [4]
    assert runlog.deterministic_lines(result.log) == runlog.deterministic_lines(quiet.log)
    name = paths.ADAPTER_WEIGHTS if method == "lora" else paths.MODEL_WEIGHTS
    assert (result.folder / name).read_bytes() == (quiet.folder / name).read_bytes()


def test_a_damaged_checkpoint_is_passed_over(lora: TrainRequest, tmp_path: Path) -> None:
    """A flipped bit in the newest checkpoint: the one before is used, this is said, and the result is the same."""
    asked = replace(lora, save_steps=2)
    quiet = train_model(replace(asked, output=tmp_path / "quiet"))
    with pytest.raises(Interrupted):
        train_model(asked, listeners=(StopAt(5),))
    newest = sorted(paths.work_dir(asked.model_folder).glob("*/checkpoints/step-*/state.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    result = train_model(asked)
    assert "está dañado" in records(result.log, "note")[0]["text"]
    assert [record["step"] for record in records(result.log, "resume")] == [2]
    assert (result.folder / paths.ADAPTER_WEIGHTS).read_bytes() == (quiet.folder / paths.ADAPTER_WEIGHTS).read_bytes()


def test_other_settings_do_not_touch_an_unfinished_run(lora: TrainRequest) -> None:
    """A run cut off stays where it is while another request trains the branch, which is told of it."""
    with pytest.raises(Interrupted):
        train_model(replace(lora, save_steps=1), listeners=(StopAt(3),))
    other = train_model(replace(lora, epochs=1))
    assert "Queda sin terminar" in records(other.log, "note")[0]["text"]
    back = train_model(lora)
    assert [record["step"] for record in records(back.log, "resume")] == [2]


def test_a_changed_machine_is_said(lora: TrainRequest) -> None:
    """Going on under other versions works, and the log says that the bits may differ."""
    with pytest.raises(Interrupted):
        train_model(replace(lora, save_steps=1), listeners=(StopAt(3),))
    [record] = paths.work_dir(lora.model_folder).glob("*/run.json")
    content = json.loads(record.read_text())
    content["fingerprint"]["torch"] = "1.0"
    record.write_text(json.dumps(content))
    result = train_model(lora)
    assert "torch: 1.0 → " in records(result.log, "note")[0]["text"]


def test_a_publication_cut_short_is_ended(lora: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying between two moved files of the finished model loses nothing: the next call moves the rest."""
    moves = 0
    move = Path.replace

    def die_at_third(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += self.parent.name == "result" and not self.name.endswith(".tmp")
        if moves == 3:
            raise Interrupted("prueba")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", die_at_third)
    with pytest.raises(Interrupted):
        train_model(lora)
    monkeypatch.undo()
    monkeypatch.setenv("SHEILY_HOME", str(lora.branches_dir.parent))
    assert specialist.read_config(lora.model_folder) is None
    result = train_model(lora)
    assert result.skipped
    assert specialist.read_config(result.folder) is not None
    assert not list(paths.work_dir(result.folder).glob("*/run.json"))


def test_a_loss_that_is_no_number_stops_the_run(lora: TrainRequest, tiny_llama: Path, tmp_path: Path) -> None:
    """A base with a NaN weight ends in an error that names it, not in a model."""
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(TrainingError, match="no es un número"):
        train_model(replace(lora, model=str(broken)))
    assert not lora.model_folder.exists()


def test_bad_rows_stop_before_any_work(lora: TrainRequest, home: Path) -> None:
    """A bad row is named by file and line, and nothing is written but the lock."""
    rows = home / "all-Branches" / "physics" / "training" / "data" / "train.jsonl"
    with rows.open("a") as file:
        file.write('{"instruction": "¿?", "output": ""}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:13"):
        train_model(lora)
    assert not lora.model_folder.exists()
    assert not (home / "var" / "central_logs").exists()


def test_unknown_layers_are_refused_with_the_names_there_are(lora: TrainRequest) -> None:
    """--lora-targets with a wrong name lists the model's own."""
    with pytest.raises(RequestError, match="q_proj"):
        train_model(replace(lora, lora_targets=("consulta",)))


def test_too_little_disk_stops_before_any_work(lora: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is looked at before the start."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(ResourceError, match="disco"):
        train_model(lora)
    assert not lora.model_folder.exists()


def test_a_disk_that_fills_at_the_end_is_told(lora: TrainRequest) -> None:
    """When the tokenizer finds no room beside the trained model, the run says so, and ends when there is some."""
    small = replace(lora, lora_r=1, lora_targets=("q_proj",), max_steps=1)
    with full_disk_after(8000), pytest.raises(ResourceError, match=r"disco está lleno.*result"):
        train_model(small)
    assert not specialist.read_config(small.model_folder)
    assert train_model(small).metrics["steps"] == 1


def test_merging_gives_the_logits_of_base_and_adapter(lora: TrainRequest, tmp_path: Path) -> None:
    """The exported folder is a plain model that computes what base and adapter compute."""
    from peft import PeftModel

    folder = train_model(replace(lora, epochs=10, precision="fp32")).folder
    merged = merge_specialist(folder, "physics", tmp_path / "merged")
    with pytest.raises(RequestError, match="ya existe"):
        merge_specialist(folder, "physics", merged)
    merge_specialist(folder, "physics", merged, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notas.txt").write_text("mías")
    with pytest.raises(RequestError, match="no es una exportación"):
        merge_specialist(folder, "physics", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "notas.txt").is_file()
    trained = train_model(replace(lora, branch="music", lora=False, max_steps=1)).folder
    with pytest.raises(RequestError, match="no es una exportación"):
        merge_specialist(folder, "physics", trained, force=True)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    base = bases.load_model(lora.model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        plain = base(ids).logits.clone()
        with quiet_peft():
            expected = PeftModel.from_pretrained(base, str(folder))(input_ids=ids).logits
        actual = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - plain).abs().max() > 0.1
    assert not (merged / paths.ADAPTER_CONFIG).exists()


def test_the_run_folder_is_where_the_key_says(lora: TrainRequest) -> None:
    """Two requests with the same key share a run; what does not decide weights is no part of it."""
    from sheily_train.core.training.preparation import prepare

    key = prepare(lora).key
    assert prepare(replace(lora, save_steps=3, save_minutes=9)).key == key
    assert prepare(replace(lora, epochs=3)).key != key
    assert Run(lora.model_folder, key).record is None
