"""Fields that declare what they take: mistakes by name, plain numbers, and ordinary dataclasses."""

import copy
import dataclasses
import json
import pickle
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field

from cartmoe.fields import Count, Flag, NonNegative, OneOf, Share, Text, declared, listed

COLOURS = {"red": 1, "blue": 2}


@declared
class Example:
    name: Text
    count: Count = 1
    sigma: NonNegative = 0.5
    share: Share | None = None
    kind: Literal["a", "b"] = "a"
    colour: Annotated[str, OneOf(COLOURS)] = "red"
    labels: Annotated[tuple[Text, ...], listed(Text)] = ()
    flag: Flag = False
    pair: tuple[Count, Count] = (1, 2)
    some: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count is 13; that brings bad luck")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(name=""), "name is ''; it must be a text"),
        (dict(count=True), "count is True; it must be a whole number"),
        (dict(count=1.0), "count is 1.0; it must be a whole number"),
        (dict(count=None), "count is None; it must be a whole number"),
        (dict(sigma=float("inf")), "sigma is inf; it must be a finite number"),
        (dict(sigma=float("nan")), "sigma is nan; it must be a finite number"),
        (dict(share=1.5), "share is 1.5; it must be at most 1"),
        (dict(kind="c"), "kind is 'c'; choose one of 'a', 'b'"),
        (dict(colour=["red"]), "colour is ['red']; choose one of 'red', 'blue'"),
        (dict(labels=["x", 3]), "labels has 3; each must be a text"),
        (dict(flag=1), "flag is 1; it must be True or False"),
        (dict(count=13), "count is 13; that brings bad luck"),
        (dict(pair=(1,)), "pair is (1,); it has too few values"),
        (dict(pair=()), "pair is (); it has too few values"),
        (dict(some=[]), "some is []; it must be a list that is not empty"),
        (dict(some=["x"]), "some has 'x'; each must be a whole number"),
    ],
)
def test_a_mistake_is_named(wrong, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        Example(**({"name": "x"} | wrong))
    assert str(error.value) == message


def test_values_by_position():
    with pytest.raises(ValueError, match=r"^Example takes 10 values; 11 is one more$"):
        Example("x", 1, 0.5, None, "a", "red", (), False, (1, 2), (1,), 11)
    with pytest.raises(ValueError, match=r"^name is 'y'; it must be given once$"):
        Example("x", name="y")


def test_all_mistakes_at_once_also_of_positions():
    with pytest.raises(ValueError, match=r"\w") as error:
        Example("x", -1, "y", size=3)
    assert str(error.value).splitlines() == [
        "count is -1; it must be at least 0",
        "sigma is 'y'; it must be a finite number",
        "field of Example is 'size'; choose one of 'name', 'count', 'sigma', 'share', 'kind', "
        "'colour', 'labels', 'flag', 'pair', 'some'",
    ]
    with pytest.raises(ValueError, match=r"^Example lacks name$"):
        Example()


def test_equal_values_are_the_same_json():
    made = Example(
        "x", np.int64(2), np.float32(0.5), np.int32(1), labels="one", flag=np.bool_(True)
    )
    plain = Example("x", 2, 0.5, 1.0, labels=("one",), flag=True)
    assert made == plain
    assert hash(made) == hash(plain)
    assert json.dumps(dataclasses.asdict(made)) == json.dumps(dataclasses.asdict(plain))
    assert type(made.share) is float


def test_it_is_an_ordinary_frozen_dataclass():
    made = Example("x", count=2)
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made
    assert dataclasses.replace(made, count=3) == Example("x", count=3)
    with pytest.raises(ValueError, match="count is -3"):
        dataclasses.replace(made, count=-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 4
    assert [f.name for f in dataclasses.fields(made)][:2] == ["name", "count"]
    assert repr(made).startswith("Example(name='x', count=2, ")
