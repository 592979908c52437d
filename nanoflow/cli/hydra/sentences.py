"""What Hydra complains about, as a sentence that says what would be right."""

from __future__ import annotations

from hydra.errors import MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.settings.checks import unknown_key
from nanoflow.cli.settings.schema import all_keys
from nanoflow.core.registry.registry import Registry


def sentence(error: Exception, command: HydraCommand, registry: Registry) -> str:
    """The sentence for an error of Hydra's while it composed a config of `command`."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        if cause.full_key.startswith("hydra."):
            return f"There is no key {cause.full_key!r}; `nanoflow {command.name} --cfg hydra` shows those of Hydra."
        return unknown_key(cause.full_key, all_keys(registry, command.schema))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        options = f"; there are: {', '.join(error.options)}" if error.options else ""
        lacks = error.missing_cfg_file.startswith("hydra/launcher/") and "joblib" not in (error.options or ())
        more = " More come with `pip install 'nanoflow-engine[launchers]'`." if lacks else ""
        return f"There is no config {error.missing_cfg_file!r}{options}.{more}"
    causes = ". ".join(str(part) for part in (error, cause) if str(part or ""))
    text = " ".join(causes.split()).partition(" full_key:")[0].rstrip(". ")
    return f"{text or type(error).__name__}."
