// Hands launches to Python. Errors raised there come back as a code and a text, which the glue turns into the
// op's RuntimeError.
#define PY_SSIZE_T_CLEAN
#include "csrc/cupy_queue.h"

#include <Python.h>

#include <string>

#include "csrc/cupy_module.h"

namespace ibq::cupy {
namespace {

PyObject* launcher = nullptr;  // owned; null: none
thread_local std::string error;

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// Keeps the text of the Python error that is set, and clears it.
int failed() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* text = value != nullptr ? PyObject_Str(value) : nullptr;
  PyObject* bytes = text != nullptr ? PyUnicode_AsUTF8String(text) : nullptr;
  error = bytes != nullptr ? PyBytes_AsString(bytes) : "the launcher raised an error without words";
  for (PyObject* object : {bytes, text, type, value, trace}) Py_XDECREF(object);
  PyErr_Clear();
  return kLauncherFailed;
}

bool missing() {
  if (launcher != nullptr) return false;
  error = "no launcher: ibq_fast.ops.cupy was not loaded";
  return true;
}

}  // namespace

const char* error_text() { return error.c_str(); }

int launcher_limits(cuda::DeviceLimits* limits) {
  const Gil gil;
  if (missing()) return kLauncherFailed;
  PyObject* found = PyObject_CallMethod(launcher, "limits", "i", static_cast<int>(current_device));
  long long multiprocessors = 0, per_multiprocessor = 0, per_block = 0;
  const bool ok = found != nullptr &&
                  PyArg_ParseTuple(found, "LLL", &multiprocessors, &per_multiprocessor, &per_block) != 0;
  Py_XDECREF(found);
  if (!ok) return failed();
  *limits = {static_cast<int>(multiprocessors), per_multiprocessor, per_block};
  return cuda::kSuccess;
}

int launcher_fill(void* at, int byte, int64_t bytes) {
  const Gil gil;
  if (missing()) return kLauncherFailed;
  PyObject* done = PyObject_CallMethod(launcher, "fill", "iKiL", static_cast<int>(current_device),
                                       static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(at)), byte,
                                       static_cast<long long>(bytes));
  Py_XDECREF(done);
  return done != nullptr ? cuda::kSuccess : failed();
}

int launcher_launch(const char* source, const char* name, const cuda::Grid& grid, const Argument* arguments,
                    size_t count) {
  const Gil gil;
  if (missing()) return kLauncherFailed;
  if (grid.blocks > INT32_MAX) return cuda::kInvalidConfiguration;
  PyObject* bytes = PyTuple_New(static_cast<Py_ssize_t>(count));
  for (size_t i = 0; bytes != nullptr && i < count; ++i) {
    PyObject* item = PyBytes_FromStringAndSize(static_cast<const char*>(arguments[i].bytes),
                                               static_cast<Py_ssize_t>(arguments[i].size));
    if (item == nullptr || PyTuple_SetItem(bytes, static_cast<Py_ssize_t>(i), item) != 0) {
      Py_DECREF(bytes);
      return failed();
    }
  }
  PyObject* done = bytes == nullptr
                       ? nullptr
                       : PyObject_CallMethod(launcher, "launch", "issLiLN", static_cast<int>(current_device),
                                             source, name, static_cast<long long>(grid.blocks), grid.threads,
                                             static_cast<long long>(grid.shared_bytes), bytes);
  Py_XDECREF(done);
  return done != nullptr ? cuda::kSuccess : failed();
}

PyObject* set_launcher(PyObject*, PyObject* object) {
  PyObject* before = launcher;
  if (object == Py_None) {
    launcher = nullptr;
  } else {
    Py_INCREF(object);
    launcher = object;
  }
  if (before == nullptr) Py_RETURN_NONE;
  return before;
}

}  // namespace ibq::cupy
