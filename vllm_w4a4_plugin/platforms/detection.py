# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM is about to choose its own CPU platform. Runs while vLLM chooses, so it imports little."""

import logging

from vllm_w4a4_plugin.constants import LOGGER

logger = logging.getLogger(LOGGER)

_asking = False


def would_choose_cpu_platform() -> bool:
    """True if vLLM would choose its plain CPU platform.

    False if vllm-ascend or another out-of-tree platform is active, on accelerators, and where vLLM has a special CPU
    platform (AMD Zen with zentorch).
    """
    global _asking
    if _asking:
        # Another plugin may ask all plugins too; without this, the two would call each other forever.
        return False
    _asking = True
    try:
        return _builtin_choice() == "vllm.platforms.cpu.CpuPlatform" and not _other_plugin_is_active()
    finally:
        _asking = False


def _builtin_choice() -> str | None:
    from vllm.platforms import builtin_platform_plugins

    chosen = [name for name in map(_answer, builtin_platform_plugins.values()) if name is not None]
    return chosen[0] if len(chosen) == 1 else None


def _other_plugin_is_active() -> bool:
    from vllm.plugins import PLATFORM_PLUGINS_GROUP, load_plugins_by_group

    others = {name: plugin for name, plugin in load_plugins_by_group(PLATFORM_PLUGINS_GROUP).items() if name != "w4a4"}
    return any(_answer(plugin) is not None for plugin in others.values())


def _answer(plugin) -> str | None:  # type: ignore[no-untyped-def]
    try:
        return plugin()
    except Exception:
        # vLLM treats a platform plugin that raises as not available.
        logger.debug("platform plugin %r failed during detection", plugin, exc_info=True)
        return None
