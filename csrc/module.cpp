// snapgen_kernels._C: loading it registers the CPU kernels. Its functions tell which instruction sets were built and which
// one is in use, and let a test force one. Only Python's limited API is used.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

namespace snapgen {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// The processor must have tiles and bf16 products on them, and the kernel must let this process use them.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Variant {
  const Kernels* table;
  bool usable;
};

// From the plainest to the widest.
const Variant* variants(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const Variant all[] = {
      {&portable::kernels, true},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
      {&avx512::kernels, has_avx512()},
      {&avx512bf16::kernels, has_avx512_bf16()},
      {&amx::kernels, has_amx()},
  };
#else
  static const Variant all[] = {{&portable::kernels, true}};
#endif
  *count = int(sizeof(all) / sizeof(all[0]));
  return all;
}

const Kernels* best() {
  int count;
  const Variant* all = variants(&count);
  const Kernels* found = nullptr;
  for (int i = 0; i < count; ++i)
    if (all[i].usable) found = all[i].table;
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = best(), std::memory_order_relaxed);
  return *table;
}

}  // namespace snapgen

static PyObject* py_variants(PyObject*, PyObject*) {
  int count;
  const snapgen::Variant* all = snapgen::variants(&count);
  PyObject* result = PyDict_New();
  for (int i = 0; result && i < count; ++i)
    if (PyDict_SetItemString(result, all[i].table->name, all[i].usable ? Py_True : Py_False) < 0) Py_CLEAR(result);
  return result;
}

static PyObject* py_variant(PyObject*, PyObject*) { return PyUnicode_FromString(snapgen::kernels().name); }

static PyObject* py_force_variant(PyObject*, PyObject* argument) {
  if (argument == Py_None) {
    snapgen::chosen.store(nullptr);
    Py_RETURN_NONE;
  }
  PyObject* utf8 = PyUnicode_AsUTF8String(argument);
  if (!utf8) return nullptr;
  const char* name = PyBytes_AsString(utf8);
  int count;
  const snapgen::Variant* all = snapgen::variants(&count);
  const snapgen::Variant* match = nullptr;
  for (int i = 0; i < count; ++i)
    if (name && std::strcmp(name, all[i].table->name) == 0) match = &all[i];
  if (!match)
    PyErr_Format(PyExc_ValueError, "variant is %R; variants() lists those that were built", argument);
  else if (!match->usable)
    PyErr_Format(PyExc_RuntimeError, "variant %R was built, but this processor lacks its instructions", argument);
  else
    snapgen::chosen.store(match->table);
  Py_DECREF(utf8);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"variants", py_variants, METH_NOARGS, "variants() -> dict: instruction sets that were built -> whether this processor has them"},
    {"variant", py_variant, METH_NOARGS, "variant() -> str: the instruction set in use"},
    {"force_variant", py_force_variant, METH_O, "force_variant(name or None): use this instruction set; None: the best one"},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The CPU kernels of snapgen_kernels.", -1, methods,
                             nullptr,               nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
