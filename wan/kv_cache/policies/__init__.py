"""Every policy: one file each, registered on import. A new file here is found by itself."""
import importlib
import logging
import pkgutil

from wan.kv_cache.policy import PolicyClash


def import_all() -> None:
    """Import each file; one that is broken is left out, with a line that says so."""
    for module in pkgutil.iter_modules(__path__):
        try:
            importlib.import_module(f"{__name__}.{module.name}")
        except PolicyClash:  # which of the two is meant, nobody knows
            raise
        except Exception as error:
            logging.getLogger(__name__).warning(
                "%s/%s.py cannot be imported, so its policy is not there: %s: %s",
                module.module_finder.path, module.name, type(error).__name__, error,
            )


import_all()
