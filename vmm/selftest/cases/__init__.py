"""The cases. Importing `all_cases` puts every one of them into `vmm.selftest.case.CASES`."""
