"""The plug-in comes right after transformers' quantisers, whichever is imported first, and once."""

import sys

import pytest

from flexq_core.runtime import registration


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Stand-ins for transformers' quantisers and for the plug-in, which notes that it came second."""
    (tmp_path / "stand_in_quantizers.py").write_text("known = []\n")
    (tmp_path / "stand_in_plugin.py").write_text(
        "import stand_in_quantizers\nstand_in_quantizers.known.append('flexq')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "QUANTIZERS", "stand_in_quantizers")
    monkeypatch.setattr(registration, "PLUGIN", "stand_in_plugin")
    finders = [finder for finder in sys.meta_path if not isinstance(finder, registration._AfterQuantizers)]
    monkeypatch.setattr(sys, "meta_path", finders)
    yield
    for name in ("stand_in_quantizers", "stand_in_plugin"):
        sys.modules.pop(name, None)


def test_it_waits_for_the_quantisers(modules):
    finders = list(sys.meta_path)
    registration.register()
    registration.register()
    assert len(sys.meta_path) == len(finders) + 1
    assert "stand_in_quantizers" not in sys.modules and "stand_in_plugin" not in sys.modules
    import json.tool  # another import in between does not matter  # noqa: F401

    import stand_in_quantizers

    assert stand_in_quantizers.known == ["flexq"]
    assert sys.meta_path == finders


def test_it_comes_at_once_where_the_quantisers_are_there(modules):
    import stand_in_quantizers

    registration.register()
    registration.register()
    assert stand_in_quantizers.known == ["flexq"]


def test_the_plug_in_may_be_imported_first(modules):
    registration.register()
    import stand_in_plugin  # noqa: F401
    import stand_in_quantizers

    assert stand_in_quantizers.known == ["flexq"]


def test_transformers_knows_the_format():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from flexq_core.runtime import hf_quantizer

    assert AUTO_QUANTIZER_MAPPING["flexq"] is hf_quantizer.FlexQHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["flexq"] is hf_quantizer.FlexQConfig
