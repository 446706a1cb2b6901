"""`minimax-m1 convert`: any checkpoint that we can read, written in the official layout."""

from __future__ import annotations

from minimax_m1.errors import UserError
from minimax_m1.settings import ConvertSettings
from minimax_m1.training.checkpoint import PROGRESS_FILE, list_steps, path_of
from minimax_m1.training.export import read_run, with_weights, write_model
from minimax_m1.weights import load_model


def convert(settings: ConvertSettings) -> None:
    """Write the model of a training run, or of a checkpoint folder, and print what became of it.

    Raises:
        UserError: folders that cannot be used, or a damaged checkpoint.
    """
    source, output = settings.checkpoint, settings.output
    if not source.is_dir():
        raise UserError(
            f"checkpoint: there is no folder {source}; accepted: a run, its checkpoint, or a model's folder"
        )
    if output.resolve() == source.resolve():
        raise UserError(f"output: {output} is the checkpoint itself; another folder is needed")
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; a folder is needed")
    if output.is_dir() and any(output.iterdir()) and not settings.overwrite:
        raise UserError(f"output: {output} is not empty; give another folder, or --overwrite")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise UserError(f"output: {output} holds no model; only one is replaced")
    steps = list_steps(source / "checkpoints")
    if steps:
        source = path_of(source / "checkpoints", steps[-1])
    if (source / PROGRESS_FILE).is_file():
        trained, tokenizer, recipe = read_run(source)
        model = with_weights(trained.config, trained.named_parameters(), settings.dtype)
        write_model(model, output, tokenizer, recipe)
    elif (source / "config.json").is_file():
        model = load_model(source, dtype=settings.dtype, progress=True)
        weights = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth")
        others = [path for path in sorted(source.iterdir()) if path.is_file() and path.name != "config.json"]
        write_model(model, output, copied=[path for path in others if not path.name.endswith(weights)])
    else:
        raise UserError(
            f"checkpoint: {source} cannot be used; accepted: the output of a training run, one of its "
            "checkpoints/step-NNNNNN, or a folder with config.json and safetensors"
        )
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{output}: the model of {source}, {size / 1e6:,.1f} MB of weights, {dtype}")
