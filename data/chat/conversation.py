"""A conversation that grows by questions and answers."""

from moetron.data.chat.encode_chat import encode_question
from moetron.data.chat.templates import Message, Template, Undecidable
from moetron.tokenizers.interface import Tokenizer


class Conversation:
    """Turns so far, in the form of a template.

    Args:
        template: of the fine-tuning.
        tokenizer: the run's.
        room: tokens that all turns may have; the oldest question and answer are forgotten first.
        system: text of a system message before all turns.
    """

    def __init__(
        self, template: Template, tokenizer: Tokenizer, room: int, system: str | None = None
    ) -> None:
        self._template, self._tokenizer, self._room = template, tokenizer, room
        self._system: list[Message] = []
        if system is not None:
            self._system = [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self.forgotten = 0
        """Questions that the next one was asked without."""

    def restart(self) -> None:
        """Forget all turns."""
        self._turns = []
        self.forgotten = 0

    def ask(self, question: str) -> list[int]:
        """Append a question; return the ids up to where its answer begins.

        Raises:
            Undecidable: it spells a special token, is too long, or the template refuses it; it is
                not appended.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": question}]
        forgotten = 0
        while True:
            ids = encode_question([*self._system, *turns], self._template, self._tokenizer)
            if len(ids) <= self._room:
                break
            if len(turns) == 1:
                raise Undecidable(f"{len(ids)} tokens; at most {self._room} leave room to answer")
            turns, forgotten = turns[2:], forgotten + 1
        self._turns = turns
        self.forgotten += forgotten
        return ids

    def answered(self, text: str) -> None:
        """Append the answer to the last question."""
        self._turns.append({"role": "assistant", "content": text})
