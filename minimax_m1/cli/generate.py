"""`minimax-m1 generate`: one prompt, the answer alone on stdout."""

from __future__ import annotations

import sys

from minimax_m1.cli.answer import AnswerStream, load_engine, sampling_params
from minimax_m1.cli.terminal import AnswerPrinter
from minimax_m1.errors import UserError
from minimax_m1.settings import GenerateSettings


def generate(settings: GenerateSettings) -> None:
    """Print the answer to `settings.prompt`.

    Raises:
        UserError: settings or a checkpoint that cannot be used.
    """
    params = sampling_params(settings)
    if settings.raw and settings.system is not None:
        raise UserError("system: cannot be used with raw, which leaves out the chat template")
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    if not prompt:
        raise UserError("prompt: is empty; at least one character is needed")
    engine = load_engine(settings)
    tokenizer = engine.needs_tokenizer("prompt")

    if settings.raw:
        answer = AnswerStream(engine, tokenizer.encode(prompt), params)
        for text in answer.texts():
            print(text, end="", flush=True)
        print()
        return
    messages = [{"role": "user", "content": prompt}]
    if settings.system is not None:
        messages.insert(0, {"role": "system", "content": settings.system})
    answer = AnswerStream(engine, tokenizer.apply_chat_template(messages), params)
    with AnswerPrinter(thinking_to=None if settings.quiet else sys.stderr) as printer:
        for event in answer.events():
            printer.print(event)
    if answer.result is not None and answer.result.finish_reason == "length" and not settings.quiet:
        print(f"(stopped at --max-new-tokens {params.max_new_tokens})", file=sys.stderr)
