"""Images for tiny vision-language models: pixel values, and token ids with as many image tokens as the model makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_models import END_OF_WORDS, FIRST_WORD, NotBuiltError

ROWS, WORDS, SIDE = 2, 5, 4  # an image is SIDE x SIDE patches
Inputs = dict[str, torch.Tensor]


def _first(config: Any, names: str, default: int) -> int:
    """The first of these attributes that is there; of a pair, its first number."""
    found = next((x for name in names.split() if (x := getattr(config, name, None)) is not None), default)
    return found if isinstance(found, int) else found[0]


def _channels(vision: Any) -> int:
    return _first(vision, "in_channels num_channels in_chans", 3)


def _square(vision: Any) -> Inputs:
    """(B, C, S, S), as most models have it."""
    size = _first(vision, "image_size", 8)
    return {"pixel_values": torch.randn(ROWS, _channels(vision), size, size)}


def _with_sizes(vision: Any) -> Inputs:
    pixels = _square(vision)["pixel_values"]
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(pixels.shape[-2:])] * ROWS)}


def _tiled(vision: Any) -> Inputs:
    """A whole image and one tile of it: (B, 2, C, S, S)."""
    given = _with_sizes(vision)
    return {**given, "pixel_values": given["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)}


def _nested(vision: Any) -> Inputs:
    """One image of each row: (B, 1, C, S, S)."""
    pixels = _square(vision)["pixel_values"][:, None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool)}


def _bare_nested(vision: Any) -> Inputs:
    return {"pixel_values": _nested(vision)["pixel_values"]}


def _grid(vision: Any) -> Inputs:
    """The patches of all images in one list, and the grid of each in time, height and width, as in Qwen2-VL."""
    patch = _first(vision, "patch_size", 4)
    time = _first(vision, "temporal_patch_size patch_temporal", 1)
    pixels = torch.randn(ROWS * SIDE * SIDE, _channels(vision) * time * patch * patch)
    ones = torch.ones(ROWS, dtype=torch.int64)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * ROWS), "image_merge_sizes": ones}


def _grid_of_pixels(vision: Any) -> Inputs:
    patch = _first(vision, "patch_size", 4)
    return {**_grid(vision), "pixel_values": torch.randn(ROWS * SIDE * SIDE, _channels(vision), patch, patch)}


def _patches(vision: Any) -> Inputs:
    """The patches of each image (B, patches, C p p), and where they are."""
    patch, places = _first(vision, "model_patch_size patch_size", 4), torch.arange(SIDE)
    return {
        "pixel_values": torch.randn(ROWS, SIDE * SIDE, _channels(vision) * patch * patch),
        "spatial_shapes": torch.tensor([[SIDE, SIDE]] * ROWS),
        "pixel_attention_mask": torch.ones(ROWS, SIDE * SIDE, dtype=torch.int64),
        "image_position_ids": torch.cartesian_prod(places, places)[None].repeat(ROWS, 1, 1),
    }


def _row_of_patches(vision: Any) -> Inputs:
    """The patches of all images side by side: (1, C, p, patches p), as in MiniCPM-V."""
    patch = _first(vision, "patch_size", 4)
    pixels = torch.randn(1, _channels(vision), patch, ROWS * SIDE * SIDE * patch)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[SIDE, SIDE]] * ROWS)}


def _tiles_of_mllama(vision: Any) -> Inputs:
    pixels = _square(vision)["pixel_values"][:, None, None].repeat(1, 1, 4, 1, 1, 1)
    ones = torch.ones(ROWS, 1, 4, dtype=torch.int64)
    return {"pixel_values": pixels, "aspect_ratio_ids": ones[..., 0], "aspect_ratio_mask": ones}


def _ways(names: set[str]) -> list[Callable[[Any], Inputs]]:
    if "aspect_ratio_ids" in names:
        return [_tiles_of_mllama]
    if "target_sizes" in names:
        return [_row_of_patches]
    if "image_grid_thw" in names:
        return [_grid, _grid_of_pixels]
    if "spatial_shapes" in names or "image_position_ids" in names:
        return [_patches]
    return [*([_with_sizes, _tiled] if "image_sizes" in names else []), _square, _nested, _bare_nested, _patches]


def _given(model: Any) -> Iterator[Inputs]:
    """Image inputs of the shapes that models ask for, as far as the names of the forward's arguments suggest them."""
    names = set(inspect.signature(model.forward).parameters)
    vision = getattr(model.config, "vision_config", None) or model.config
    for way in _ways(names):
        torch.manual_seed(1)
        given = {name: value for name, value in way(vision).items() if name in names}
        if "high_res_pixel_values" in names:
            given["high_res_pixel_values"] = given["pixel_values"].clone()
        if "qformer_input_ids" in names:
            given["qformer_input_ids"] = torch.randint(FIRST_WORD, END_OF_WORDS, (ROWS, 3))
        yield given


def _image_token(config: Any) -> int | None:
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    return next((x for name in names if isinstance(x := getattr(config, name, None), int)), None)


def _count(model: Any, given: Inputs) -> int:
    """Image tokens of a row, by the model's own function; of models that have none, by their configuration."""
    for part in (model, getattr(model, "model", None)):
        if hasattr(part, "get_image_features"):
            out = part.get_image_features(**given)
            pooled = getattr(out, "pooler_output", None)
            out = pooled if pooled is not None else getattr(out, "last_hidden_state", out)
            parts = [out] if isinstance(out, torch.Tensor) else [x for x in out if isinstance(x, torch.Tensor)] or list(out[0])
            return sum(x.shape[:-1].numel() for x in parts) // ROWS
    return _first(model.config, "latent_query_num num_query_tokens", 0)


def _ids_with(model: Any, count: int) -> torch.Tensor:
    """(B, T): words, the image, and words."""
    token = _image_token(model.config)
    words = torch.randint(FIRST_WORD, END_OF_WORDS, (ROWS, WORDS + 2), generator=torch.Generator().manual_seed(2))
    image = torch.full((ROWS, count), token or 0)
    start = getattr(model.config, "vision_start_token_id", None)
    begin = [] if start is None else [torch.full((ROWS, 1), start)]
    return torch.cat([words[:, :2], *begin, image, words[:, 2:]], dim=1)


def of_tokens(model: Any, ids: torch.Tensor) -> Inputs:
    """What some models ask for beside the ids: which of them are the image's, and which see it."""
    names, token = inspect.signature(model.forward).parameters, _image_token(model.config)
    is_image = ids == (0 if token is None else token)
    seen = is_image.flip(1).cummax(1).values.flip(1)  # up to the end of the image
    is_answer = (~seen).long()
    every = {
        "mm_token_type_ids": is_image.long(),
        "moe_mm_token_type_ids": is_image.long(),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(*ids.shape, 1, 4, dtype=torch.int64),
        "image_embeds_position_mask": is_image.long(),
    }
    given = {name: value for name, value in every.items() if name in names}
    if model.config.model_type == "paligemma":  # whose prompt sees all of itself: tokens of type 0
        given["token_type_ids"] = is_answer
    return given


def padded_on_the_left(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of two tokens more, which are words in the first row and padding in the others."""
    more = torch.full((len(ids), 2), FIRST_WORD)
    more[1:] = 0
    mask = torch.cat([(more != 0).long(), torch.ones_like(ids)], dim=1)
    return torch.cat([more, ids], dim=1), mask


def takes_images(model: Any) -> bool:
    return "pixel_values" in inspect.signature(model.forward).parameters


def image_inputs(model: Any) -> tuple[torch.Tensor, Inputs]:
    """(input_ids, the images without `of_tokens`), of the first way that the model's forward takes.

    It is taken only if other images give other logits.
    """
    errors = []
    for given in _given(model):
        try:
            with torch.no_grad():
                ids = _ids_with(model, _count(model, given))
                inputs = given | of_tokens(model, ids)
                first = model(input_ids=ids, **inputs).logits
                other = {name: -value if name.endswith("pixel_values") else value for name, value in inputs.items()}
                if torch.equal(first, model(input_ids=ids, **other).logits):
                    raise ValueError("another image gives the same logits")
            return ids, given
        except Exception as error:  # of a shape that this model does not take
            errors.append(f"{type(error).__name__}: {error}")
    raise NotBuiltError(f"none were found that its forward takes ({errors[0]})")
