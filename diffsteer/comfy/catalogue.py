"""All nodes, and what ComfyUI is handed of them."""

from __future__ import annotations

from typing import Any

from diffsteer import schedules
from diffsteer.comfy import parts, sampling
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.node import Node, as_v1, as_v3
from diffsteer.comfy.registered import reward_node, sampler_node, schedule_node
from diffsteer.registry import registered

V3 = "comfy_api.v0_0_2"  # a version of ComfyUI's interface that stays as it is


def nodes(host: Host = HOST) -> list[Node]:
    """Every node: those that are written, and one a registered sampler (without gradients), reward and schedule."""
    samplers = {n: c for n, c in sorted(registered("sampler").items()) if not c.needs_grad}
    listed = [getattr(schedules, name) for name in schedules.__all__]
    return [
        *sampling.nodes(host),
        *(sampler_node(name, cls, host) for name, cls in samplers.items()),
        *(reward_node(name, cls) for name, cls in sorted(registered("reward").items())),
        *(schedule_node(cls.name, cls) for cls in listed),
        *parts.nodes(host),
    ]


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
