# SPDX-License-Identifier: Apache-2.0
raise ImportError("libascend_hal.so: cannot open shared object file: No such file or directory")
