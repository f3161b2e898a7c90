// The Python module ibq_fast._C. Importing it registers the ops; its functions report what the binary is.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels/cpu/codebook.h"
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

// tile_shape(): rows and codes of a tile of the CPU kernels in use, and the smallest codebook that keeps
// bounds; cuda_tile_shape(): the same of the CUDA kernels, linked in or not.
PyObject* cuda_tile_shape(PyObject*, PyObject*) {
  return Py_BuildValue("iiL", ibq::cuda::kSweepTileRows, ibq::cuda::kSweepTileCodes,
                       static_cast<long long>(ibq::cuda::kBoundedFrom));
}

PyObject* tile_shape(PyObject*, PyObject*) {
  const ibq::cpu::Kernels* kernels = ibq::cpu::kernels();
  if (kernels == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "IBQ_FAST_CPU_ISA: expected one of %s", ibq::cpu::available_isas());
    return nullptr;
  }
  return Py_BuildValue("iii", kernels->tile_rows, kernels->block_codes, kernels->bounded_from);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "Name of the CPU instruction set in use, or None if the forced one is absent."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Names of the CPU instruction sets available here, best first."},
    {"tile_shape", tile_shape, METH_NOARGS,
     "Rows, codes and smallest codebook of the CPU kernels' tile bounds."},
    {"cuda_tile_shape", cuda_tile_shape, METH_NOARGS,
     "Rows, codes and smallest codebook of the CUDA kernels' tile bounds."},
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
