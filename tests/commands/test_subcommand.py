"""How a subcommand ends where its input, the machine or the network does not suffice."""

import pytest
from jsonargparse import Namespace

from anomalib_exdd.commands.subcommand import Subcommand


class Failing(Subcommand):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def call(self, config: Namespace) -> None:
        raise self.error


class Resuming(Failing):
    kept = "Half of it is kept."


@pytest.mark.parametrize("kind", [Failing, Resuming])
@pytest.mark.parametrize("error", [ValueError("it is wrong"), FileNotFoundError("it is wrong")])
def test_wrong_input_ends_with_one_line(kind: type[Failing], error: Exception) -> None:
    with pytest.raises(SystemExit) as caught:
        kind(error).run(Namespace())
    assert caught.value.code == "Error: it is wrong"


@pytest.mark.parametrize("error", [RuntimeError("no memory:\n  3 GB are free"), OSError("no memory:\n  3 GB are free")])
def test_only_what_goes_on_later_makes_one_line_of_other_failures(error: Exception) -> None:
    with pytest.raises(SystemExit) as caught:
        Resuming(error).run(Namespace())
    assert caught.value.code == "Error: no memory: 3 GB are free (Half of it is kept.)"
    with pytest.raises(type(error)):
        Failing(error).run(Namespace())
