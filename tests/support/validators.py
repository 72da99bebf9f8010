"""Plugin classes that refuse what they read, each in another place and in words of their own."""

from __future__ import annotations

from pydantic import BaseModel, field_validator, model_validator

from lorax_qwen2.config import Qwen2Config
from lorax_qwen2.modeling import FlashQwen2Model

SENTENCE = "more than two are not supported"


class Part(BaseModel):
    """A nested model of a plugin."""

    count: int

    @field_validator("count")
    @classmethod
    def _few(cls, value):
        if value > 2:
            raise ValueError(SENTENCE)
        return value


class OfAField(Qwen2Config):
    @field_validator("rms_norm_eps")
    @classmethod
    def _refuse(cls, value):
        raise ValueError(SENTENCE)


class OfTheWhole(Qwen2Config):
    @model_validator(mode="after")
    def _refuse(self):
        raise ValueError(SENTENCE)


class ByAssertion(Qwen2Config):
    @model_validator(mode="after")
    def _refuse(self):
        raise AssertionError(SENTENCE)


class InNormalise(Qwen2Config):
    @classmethod
    def normalise(cls, raw):
        raise ValueError(SENTENCE)


class InAPartOfNormalise(Qwen2Config):
    @classmethod
    def normalise(cls, raw):
        return {**super().normalise(raw), "part": Part(count=5)}


class InABackbone(FlashQwen2Model):
    def __init__(self, config) -> None:
        super().__init__(config)
        Part(count=5)


class InAMap(FlashQwen2Model):
    @staticmethod
    def weight_map(config):
        return Part(count=5)
