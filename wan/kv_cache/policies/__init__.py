"""Every policy: one file each, registered on import. A new file here is found by itself."""
import importlib
import logging
import pkgutil


def import_all() -> None:
    """Import each file; one that is broken is left out, with a line that says so."""
    for module in pkgutil.iter_modules(__path__):
        try:
            importlib.import_module(f"{__name__}.{module.name}")
        except ValueError:  # two policies of one name: which one is meant, nobody knows
            raise
        except Exception as error:
            logging.getLogger(__name__).warning(
                "%s/%s.py cannot be imported, so its policy is not there: %s: %s",
                module.module_finder.path, module.name, type(error).__name__, error,
            )


import_all()
