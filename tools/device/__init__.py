"""All that needs a GPU, in one call: `python tools/device_check.py`.

agenda     which cases, in which order, and the time there is
ahead      compiles what comes next while the device works
fuzz       random lengths and tables, against the reference
measuring  one case: checked, then timed beside its peers
sanitizer  the device's own memory checker, over a few cases
gates      what a record has to show
report     the record as a table
picture    the record as a roofline
check      the whole run
"""
