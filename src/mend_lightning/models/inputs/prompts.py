"""How a fact becomes text: one format for training, editing and evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass

from mend_lightning.errors import ConfigError


@dataclass(frozen=True)
class PromptFormat:
    """Text around a question and its answer.

    Args:
        prompt: template of the question; `{input}` is replaced.
        target: template of the answer; `{target}` is replaced. For a causal model it starts with the
            space that separates it from the prompt, for the tokenizer glues the two together.
        stop: what ends an answer, and is trained and generated with it: text such as a newline, "" for
            the tokenizer's end-of-sequence token, or None for answers that nothing ends (the next tokens of a
            running text).

    Example:
        >>> PromptFormat("Q: {input}\\nA:").question("Why?")
        'Q: Why?\\nA:'
    """

    prompt: str = "{input}"
    target: str = " {target}"
    stop: str | None = ""

    def __post_init__(self) -> None:
        for name, key in (("prompt", "{input}"), ("target", "{target}")):
            template = getattr(self, name)
            if key not in template:
                raise ConfigError(f"The {name} template must contain {key}; it is {template!r}.")

    def question(self, prompt: str) -> str:
        """The text the model is asked to continue."""
        return self.prompt.replace("{input}", prompt)

    def answer(self, target: str) -> str:
        """The continuation, without its stop."""
        return self.target.replace("{target}", target)

    def read(self, continuation: str) -> str:
        """The answer in a generated continuation: what stands before the stop (or all of it), without the blanks."""
        return (continuation.split(self.stop)[0] if self.stop else continuation).strip()


# Of generation data: nothing stands around a text, and nothing ends it.
RUNNING_TEXT = PromptFormat("{input}", "{target}", None)
