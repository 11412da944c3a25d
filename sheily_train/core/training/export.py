"""A specialist as a plain model: adapter added into the base's weights, one folder that any tool loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from sheily_train import durable, paths
from sheily_train.core.training import results
from sheily_train.core.training.evaluation import open_specialist
from sheily_train.errors import RequestError
from sheily_train.i18n import _


def merge_specialist(folder: Path, branch: str, output: Path, *, force: bool = False) -> Path:
    """Write the model in ``folder`` as a whole float32 model to ``output``, all of it or nothing.

    The logits equal those of base and adapter up to the rounding of a float32 addition.

    Raises:
        RequestError: no model was trained; ``output`` exists and ``force`` is off; or it exists and is no whole model,
            or a trained specialist, which ``force`` does not replace.
    """
    if output.exists() and not force:
        raise RequestError(_("{output} ya existe.").format(output=output), mend=_("Usa --force o elige otra --output."))
    is_model, is_specialist = ((output / name).is_file() for name in (paths.MODEL_WEIGHTS, paths.TRAINING_CONFIG))
    if output.exists() and (is_specialist or not is_model):
        raise RequestError(
            _("{output} no es una exportación anterior: no se sustituye.").format(output=output),
            mend=_("Elige otra --output."),
        )
    loaded = open_specialist(folder, branch, device="cpu", precision="fp32")
    model = loaded.model.merge_and_unload() if loaded.has_adapter else loaded.model
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with durable.naming(output):
            results.write_whole_model(temporary, model)
            loaded.tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            durable.sync_file(path)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    durable.sync_folder(output.parent)
    return output
