"""The named data sets, one small file per family."""
