"""Registry: plug-ins are found by file name and described without importing them."""

from __future__ import annotations

import inspect
import typing

import pytest

from tunesmith import registry


@pytest.mark.parametrize("kind", typing.get_args(registry.Kind))
def test_descriptions_match_the_plug_ins(kind: registry.Kind) -> None:
    plugins = {name: registry.get(kind, name) for name in registry.names(kind)}
    wanted = [(name, inspect.getdoc(one), list(one.model_fields)) for name, one in plugins.items()]
    assert [tuple(one) for one in registry.about(kind)] == wanted
