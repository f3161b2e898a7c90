// What csrc/cupy_queue.cpp gives to the Python module.
#pragma once

#include <Python.h>

namespace ibq::cupy {

// set_cupy_launcher(launcher): the object whose limits, fill and launch serve the ops of ibq_fast_cupy, or
// None; returns the one before.
PyObject* set_launcher(PyObject* module, PyObject* launcher);

}  // namespace ibq::cupy
