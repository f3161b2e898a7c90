// The Python module ibq_fast._C. Importing it registers the ops; its functions report what the binary is.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "csrc/cupy_module.h"
#include "csrc/skip_tolerance.h"
#include "kernels/cpu/codebook.h"
#include "kernels/cpu/kept_memory.h"
#include "kernels/cuda/sweep_plan.h"

namespace {

// cpu_isa(): name of the CPU instruction set in use, or None when IBQ_FAST_CPU_ISA names one that is absent.
PyObject* cpu_isa(PyObject*, PyObject*) {
  const ibq::cpu::Kernels* kernels = ibq::cpu::kernels();
  if (kernels == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(kernels->name);
}

// cpu_isas(): comma-separated names of what this binary has and this CPU can run, best first.
PyObject* cpu_isas(PyObject*, PyObject*) { return PyUnicode_FromString(ibq::cpu::available_isas()); }

// has_cuda(): whether CUDA kernels are linked in.
PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef IBQ_FAST_WITH_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

// cuda_tile_shape(): rows and codes of a tile of the CUDA kernels, linked in or not, and the smallest
// codebook that keeps bounds.
PyObject* cuda_tile_shape(PyObject*, PyObject*) {
  return Py_BuildValue("iiL", ibq::cuda::kSweepTileRows, ibq::cuda::kSweepTileCodes,
                       static_cast<long long>(ibq::cuda::kBoundedFrom));
}

// tile_shape(): rows and codes of a tile of the CPU kernels in use, the smallest codebook that keeps bounds
// and candidates, and the bytes of candidates that any codebook may have.
PyObject* tile_shape(PyObject*, PyObject*) {
  const ibq::cpu::Kernels* kernels = ibq::cpu::kernels();
  if (kernels == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "IBQ_FAST_CPU_ISA: expected one of %s", ibq::cpu::available_isas());
    return nullptr;
  }
  return Py_BuildValue("iiiL", kernels->tile_rows, kernels->block_codes, kernels->bounded_from,
                       static_cast<long long>(ibq::cpu::kCandidateBytes));
}

// release_memory(): frees what CPU ops keep for their next large output; returns its bytes.
PyObject* release_memory(PyObject*, PyObject*) {
  return PyLong_FromLongLong(ibq::cpu::release_kept_memory());
}

// set_skip_tolerance(float): what ibq_fast.ops.skipping has checked.
PyObject* set_skip_tolerance(PyObject*, PyObject* value) {
  const double tolerance = PyFloat_AsDouble(value);
  if (tolerance == -1.0 && PyErr_Occurred() != nullptr) return nullptr;
  ibq::skip_tolerance.store(static_cast<float>(tolerance));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_skip_tolerance", set_skip_tolerance, METH_O,
     "Set the share of a row's softmax mass that kernels may leave out."},
    {"release_memory", release_memory, METH_NOARGS,
     "Free the memory that CPU ops keep for their next large output; returns its bytes."},
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "Name of the CPU instruction set in use, or None if the forced one is absent."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Names of the CPU instruction sets available here, best first."},
    {"tile_shape", tile_shape, METH_NOARGS,
     "Rows, codes and smallest codebook of the CPU kernels' tile bounds; most bytes of candidates."},
    {"cuda_tile_shape", cuda_tile_shape, METH_NOARGS,
     "Rows, codes and smallest codebook of the CUDA kernels' tile bounds."},
    {"set_cupy_launcher", ibq::cupy::set_launcher, METH_O,
     "Sets the object that makes the launches of namespace ibq_fast_cupy; returns the one before."},
    {"has_cuda", has_cuda, METH_NOARGS, "Whether CUDA kernels are linked in."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Compiled ops of ibq_fast.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
