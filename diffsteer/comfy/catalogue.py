"""All nodes, and what ComfyUI is handed of them."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from diffsteer.comfy import parts, sampling
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.node import Node, as_v1, as_v3
from diffsteer.comfy.registered import reward_node, sampler_node, schedule_node
from diffsteer.registry import registered

V3 = "comfy_api.v0_0_2"  # a version of ComfyUI's interface that stays as it is


def nodes(host: Host = HOST) -> list[Node]:
    """Every node: those that are written, and one a registered sampler (that can be one), reward and schedule (not those that a
    run measures). One of these that cannot be a node is left out, and said."""
    found = sampling.nodes(host)
    for kind, make in (("sampler", partial(sampler_node, host=host)), ("reward", reward_node), ("schedule", schedule_node)):
        for name, cls in sorted(registered(kind).items()):
            nested = any("of" in f.metadata for f in getattr(cls, "__dataclass_fields__", {}).values())
            if nested or (kind == "sampler" and not sampling.is_a_node(cls)) or hasattr(cls, "measured"):
                continue
            try:
                found.append(make(name, cls))
            except Exception as error:
                warnings.warn(f"the {kind} {name} is no node: {error}", stacklevel=2)
    return [*found, *parts.nodes(host)]


def for_comfyui() -> dict[str, Any]:
    """The names that ComfyUI looks for in a node pack: `comfy_entrypoint` where there is the V3 schema, else V1's mappings."""
    try:
        from comfy_api.v0_0_2 import ComfyExtension, io
    except ImportError:
        listed = nodes()
        return {
            "NODE_CLASS_MAPPINGS": {node.id: as_v1(node) for node in listed},
            "NODE_DISPLAY_NAME_MAPPINGS": {node.id: node.title for node in listed},
        }

    class Extension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[Any]:
            return [as_v3(node, io) for node in nodes()]

    async def comfy_entrypoint() -> Any:
        return Extension()

    return {"comfy_entrypoint": comfy_entrypoint}
